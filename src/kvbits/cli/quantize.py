"""``kvbits quantize``: a checkpoint of 4- or 8-bit weights, rounded with error feedback."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.output import can_be_folder, folder
from kvbits.cli.session import Bar, load, note, tokens_of
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.models import LoadedModel


def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the checkpoint goes.")],
    weights: Annotated[
        str, typer.Option(metavar="FORMAT", help="int4 or int8: in groups of 32 with a scale and a zero point.")
    ] = "int4",
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A UTF-8 text; repeat for several. Without any, the model writes its own."),
    ] = None,
    window: Annotated[int, typer.Option(min=4, metavar="TOKENS", help="Tokens of one window.")] = 2048,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows to calibrate on, all over the text.")] = 8,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a model whose files are quantized already.")
    ] = False,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Round a model's linear layers so that their outputs change least (GPTQ), and write them as a checkpoint.

    compressed-tensors (pack-quantized, W4A16 or W8A16), which kvbits and vLLM load in its bits. Embedding and head
    stay in 16 bits. Interrupted, the same command goes on where it was: finished layers are kept in DIR/unfinished.
    """
    begin = time.perf_counter()
    from kvbits.calibration.output import UNFINISHED, check_output
    from kvbits.engine.precheck import check_model
    from kvbits.evaluation.windows import check_text, read_text
    from kvbits.memory import show

    if weights not in ("int4", "int8"):
        raise ConfigError(f"--weights '{weights}' cannot be made; choose from int4, int8")
    contents = [(path.name, read_text(path)) for path in text or ()]
    can_be_folder(output)
    check_output(output)
    check_model(model, dtype="float32", context=window)
    if contents:
        check_text([content for _, content in contents], window, windows)
    import torch

    from kvbits.calibration.quantize import quantize as run
    from kvbits.models.opened import open_model

    if threads is not None:
        torch.set_num_threads(threads)
    note(f"Loading {model} (float32, layer by layer) ...")
    opened = open_model(model, allow_requantize, trust_remote_code)
    folder(output)
    texts = [(name, tokens_of(opened.loaded, content)) for name, content in contents]

    def author() -> LoadedModel:
        return load(model, "bfloat16", threads, trust_remote_code=trust_remote_code)

    try:
        done = run(opened, texts, output, weights, (window, windows), Bar, note, author)
    except KeyboardInterrupt:
        note(f"what is finished is kept in '{output / UNFINISHED}'; the same command goes on from there")
        raise
    print(
        f"{done.layers} linear layers in {weights}: squared error of their outputs on the text {done.error:.2f} of "
        f"rounding to nearest's\n{show(done.bytes)} in {output}\n{time.perf_counter() - begin:.0f} s in all"
    )
