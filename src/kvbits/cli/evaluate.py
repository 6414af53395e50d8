"""``kvbits evaluate``: what a cache dtype costs in fidelity on a text of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile
from kvbits.cli.session import Bar, load, machine, tokens_of

if TYPE_CHECKING:
    from kvbits.evaluation.compare import Comparison


def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A UTF-8 text, evaluated from its start.")],
    kv_cache_dtype: options.KVCacheDtypes = None,
    kv_policy: options.KVPolicies = None,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of one window.")] = 2048,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows, one after another, not overlapping.")] = 8,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 512,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Arithmetic of the model's layers. The default float32 keeps bfloat16's rounding noise in the linear "
            "layers, which both caches share in kind but not in value, out of the comparison.",
        ),
    ] = "float32",
    threads: options.Threads = None,
    json_file: options.JsonFile = None,
) -> None:
    """Compare cache dtypes with the 16-bit cache, token by token, through the real pool and kernels.

    The second half of each window is scored: perplexity, KL divergence in nats, how often the likeliest token is the
    same.
    """
    results = JsonFile(json_file)
    dtypes = options.cache_dtypes(kv_cache_dtype, kv_policy)
    from kvbits.evaluation.windows import cut_windows, read_text

    content = read_text(text)
    from kvbits.evaluation.compare import REFERENCE, check_dtypes, compare

    loaded = load(model, dtype, threads)
    check_dtypes(loaded, dtypes, context)
    parts = cut_windows(tokens_of(loaded, content), context, windows)
    with Bar(context * windows * len({REFERENCE, *dtypes}), "evaluating") as advance:
        found = compare(loaded, dtypes, parts, max_num_batched_tokens, advance)
    _print(found)
    rows = [result.as_json() | {"compute_dtype": dtype} for result in found]
    flat = rows[0] if len(rows) == 1 else {}
    results.write({**flat, "results": rows, "model": loaded.name, "text": str(text), **machine()})


def _print(found: list[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = found[0].summary
    table = Table(
        title=f"{found[0].windows} windows of {found[0].context} tokens; 16 bit: {first.perplexity_16bit:.3f}"
    )
    for name in ("KV cache", "bits", "all bits", "perplexity", "change", "KL mean", "KL 99 %", "same top"):
        table.add_column(name, justify="left" if name == "KV cache" else "right")
    for result in found:
        s = result.summary
        table.add_row(
            result.dtype,
            f"{result.bits_per_element:.2f}",
            f"{result.effective_bits_per_element:.2f}",
            f"{s.perplexity:.3f}",
            f"{100 * (s.perplexity / s.perplexity_16bit - 1):+.2f} %",
            f"{s.kl_mean:.2g}",
            f"{s.kl_p99:.2g}",
            f"{100 * s.top1_agreement:.1f} %",
        )
    Console().print(table)
