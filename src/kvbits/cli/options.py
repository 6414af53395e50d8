"""Arguments that several commands share. The names are the ones that vLLM users know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="smollm2-135m, a Hugging Face repository, a directory (safetensors) or a GGUF file."
    ),
]
KVCacheDtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="'int4', 'bf16', ... for all; 'int8,int4' for keys and values; '0-1:int8,2-29:int4' by layer.",
    ),
]
KVCacheDtypes = Annotated[
    list[str],
    typer.Option(
        metavar="DTYPE", help="As for generate ('int4', 'int8,int4', '0-1:int8,2-29:int4'); repeat to compare several."
    ),
]
KVCacheMemory = Annotated[str, typer.Option(metavar="SIZE", help="Bytes of the cache, for example 256MiB or 1.5GB.")]
MaxModelLen = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Longest prompt plus answer. Default: the model's context.")
]
MaxNumSeqs = Annotated[int, typer.Option(metavar="N", help="Most sequences that run at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(metavar="TOKENS", help="Token budget of one step, prefill included.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="Arithmetic of the model's layers: bfloat16 or float32.")]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads. Default: what torch chooses.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results here as JSON.")]
