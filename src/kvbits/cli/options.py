"""Arguments that several commands share. The names are the ones that vLLM users know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbits.config import POLICY_PREFIX
from kvbits.errors import ConfigError

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
        help="'auto': the fewest bits that lose no more than --max-kl on this model, measured at its first start; "
        "'int4', 'bf16', ... for all; 'int8,int4' for keys and values; '0-1:int8,2-29:int4' by layer; "
        "'int4+sink:int8' with another dtype for each sequence's first page. 'fp8' is there for exchange with other "
        "engines: as many bytes as 'int8', and KL 0.003 to 0.008 where that has 0.0001.",
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="With --kv-cache-dtype auto: the largest KL to 16 bit, per token. Default: 0.001, no measurable loss.",
    ),
]
MeasuredText = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", help="With --kv-cache-dtype auto: measure on this UTF-8 text. Default: the model's."
    ),
]
KVCacheDtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="As for generate, but not 'auto' ('int4', 'int8,int4', '0-1:int8,2-29:int4'); repeat to compare several.",
    ),
]
KVPolicy = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A policy that 'kvbits calibrate' wrote, in the place of --kv-cache-dtype."),
]
KVPolicies = Annotated[
    list[Path] | None,
    typer.Option("--kv-policy", metavar="DIR", help="A policy that 'kvbits calibrate' wrote; repeat for several."),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="Weights of linear layers and embeddings: auto (the files' own bits), bf16 (unpacked), "
        "int8 or int4 (rounded in groups of 32).",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", help="Where the model runs: cpu, or a GPU such as cuda (pip install 'kvbits\\[gpu]')."
    ),
]
KVCacheMemory = Annotated[str, typer.Option(metavar="SIZE", help="Bytes of the cache, for example 256MiB or 1.5GB.")]
KVOffloadSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Keep pages that the cache gives up in so much host memory, or in a file."),
]
KVOffloadPath = Annotated[
    str | None, typer.Option(metavar="PATH", help="A file or a directory for --kv-offload-size, instead of memory.")
]
StateDtype = Annotated[
    str,
    typer.Option(
        "--state-dtype",
        "--mamba-ssm-cache-dtype",
        metavar="DTYPE",
        help="Recurrent states between steps: auto (as the model computes them), float32 or bfloat16.",
    ),
]
DisableMLA = Annotated[
    bool,
    typer.Option(
        "--disable-mla",
        help="Cache every head's keys and values, not the latents of multi-head latent attention (DeepSeek): more "
        "bytes, and fewer operations. GPUs do so anyway.",
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Longest prompt plus answer. Default: the model's context.")
]
MaxNumSeqs = Annotated[int, typer.Option(metavar="N", help="Most sequences that run at once.")]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS", help="Token budget of one step, prefill included. Default: 512 on a CPU, 2048 on a GPU."
    ),
]
Speculative = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        metavar="JSON",
        help="Guess tokens ahead; answers stay the same. 'ngram', or JSON such as "
        '{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4}.',
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest token. Default: the model's generation configuration, or else 1."),
]
TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens of this total probability. Default: the model's, or 1.")
]
TopK = Annotated[int | None, typer.Option(help="Keep the likeliest K tokens; 0 keeps all. Default: the model's, or 0.")]
MinP = Annotated[
    float | None, typer.Option(help="Keep tokens of this share of the likeliest's probability. Default: as above, 0.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Over 1: against tokens of the prompt and the answer. Default: the model's, or 1.")
]
PresencePenalty = Annotated[float | None, typer.Option(help="Over 0: against tokens that the answer has had.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Over 0: the same, times how often it has had them.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may repeat.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="Arithmetic of the model's layers: bfloat16 or float32.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, metavar="N", help="CPU threads. Default: what torch chooses.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it first.")
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Take the key from a file; without either option from KVBITS_API_KEY."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results here as JSON.")]


def cache_dtype(dtype: str, policy: Path | None) -> str:
    """The dtype that the engine is given: the policy's directory where there is one."""
    return dtype if policy is None else f"{POLICY_PREFIX}{policy}"


def named(dtypes: list[str] | None, policies: list[Path] | None) -> list[str]:
    """All dtypes and policies, each once, perhaps none."""
    return list(dict.fromkeys([*(dtypes or ()), *(cache_dtype("", path) for path in policies or ())]))


def cache_dtypes(dtypes: list[str] | None, policies: list[Path] | None) -> list[str]:
    """All dtypes and policies to run. Raises ``ConfigError`` when there is none."""
    found = named(dtypes, policies)
    if not found:
        raise ConfigError("there is nothing to run; give --kv-cache-dtype DTYPE or --kv-policy DIR")
    return found
