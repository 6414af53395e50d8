"""``kvbits demo``: long conversations from a 16-bit, an INT8 and an INT4 cache of the same size in bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.extras import require
from kvbits.cli.output import JsonFile, folder
from kvbits.cli.session import Bar, load, machine, note, tokens_of
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.codecs import Policy
    from kvbits.evaluation.demo import Showing
    from kvbits.evaluation.fidelity import FidelitySummary
    from kvbits.models import LoadedModel

DTYPES = ("bf16", "int8", "int4")
WINDOW = 2048


def demo(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As for generate.")] = "smollm2-135m",
    sessions: Annotated[int, typer.Option(min=1, max=12, metavar="N", help="Conversations, one a document.")] = 8,
    document_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Least length of a document.")] = 2200,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that each conversation generates.")] = 64,
    kv_cache_memory: options.KVCacheMemory = "160MiB",
    kv_policy: options.KVPolicies = None,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of 2,048 tokens for KL and top-1.")] = 1,
    also: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, whose KL is shown beside the first one's.")
    ] = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    dtype: options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where demo.png and demo.json go.")] = Path("out"),
    json_file: options.JsonFile = None,
) -> None:
    """Show what a quantized cache buys and costs: sessions at once, bytes, speed, fidelity, answers found."""
    begin = time.perf_counter()
    from kvbits.config import parse_bytes
    from kvbits.engine.config import step_tokens
    from kvbits.engine.precheck import check_model
    from kvbits.evaluation.documents import hide_facts
    from kvbits.memory import check_host
    from kvbits.memory import show as size_of

    require("plot")
    memory = parse_bytes(kv_cache_memory)
    check_host({"--kv-cache-memory": memory})
    dtypes = options.cache_dtypes(list(DTYPES), kv_policy)
    outline = check_model(
        model, dtypes, dtype=dtype, weights=weights, context=max(WINDOW, document_tokens + new_tokens)
    )
    if outline.geometry is not None:
        needed = (document_tokens + new_tokens) * outline.geometry.bytes_per_token_16bit()
        if memory < needed:
            raise ConfigError(
                f"--kv-cache-memory is {kv_cache_memory}; one conversation in 16 bit needs {size_of(needed)}"
            )
    if also is not None:
        check_model(also, dtypes, dtype=dtype, weights=weights, context=WINDOW)
    results = JsonFile(folder(output) / "demo.json" if json_file is None else json_file)
    from kvbits.evaluation.demo import show
    from kvbits.evaluation.picture import draw

    # Fidelity in float32, as evaluate does it: bfloat16 layers add noise of their own that INT8 would be blamed for.
    budget = step_tokens(max_num_batched_tokens, "cpu")

    def measured(name: str) -> dict[str, FidelitySummary]:
        exact = load(name, "float32", threads, weights, trust_remote_code=trust_remote_code)
        return _fidelity(exact, [exact.policy(dtype) for dtype in dtypes], windows, budget)

    beside = None if also is None else measured(also)
    fidelity = measured(model)
    loaded = load(model, dtype, threads, weights, trust_remote_code=trust_remote_code)
    policies = [loaded.policy(name) for name in dtypes]
    documents = hide_facts(sessions, document_tokens, lambda part: len(tokens_of(loaded, part)))
    note(f"{sessions} conversations over documents of {document_tokens}+ tokens; each cache has {kv_cache_memory}.")
    shown = []
    prompts = sum(len(tokens_of(loaded, d.text + d.question)) for d in documents)
    for policy in policies:
        with Bar(prompts + sessions * new_tokens, f"{policy.label} conversations") as advance:
            summary = fidelity[policy.label]
            shown.append(show(loaded, policy, memory, documents, summary, new_tokens, budget, advance))
    picture = output / "demo.png"
    draw(shown, memory, folder(output) / "demo.png")
    seconds = time.perf_counter() - begin
    second = None if beside is None else {"model": also, "dtypes": {name: asdict(s) for name, s in beside.items()}}
    found = {"dtypes": [s.as_json() for s in shown], "pool_bytes": memory, "also": second, "seconds": seconds}
    results.write(found | machine())
    _print(shown, kv_cache_memory, beside, "" if also is None else Path(also).stem)
    print(f"picture: {picture}\nresults: {results.path}\n{seconds:.0f} s in all")


def _fidelity(
    loaded: LoadedModel, policies: list[Policy], windows: int, max_num_batched_tokens: int
) -> dict[str, FidelitySummary]:
    """Each dtype against 16 bit on the start of the reference."""
    from kvbits.evaluation.compare import compare
    from kvbits.evaluation.documents import reference_text
    from kvbits.evaluation.windows import cut_windows

    parts = cut_windows(tokens_of(loaded, reference_text()), WINDOW, windows)
    with Bar(WINDOW * windows * len(policies), "fidelity") as advance:
        return {c.dtype: c.summary for c in compare(loaded, policies, parts, max_num_batched_tokens, advance)}


def _print(
    shown: list[Showing], memory: str, beside: Mapping[str, FidelitySummary] | None = None, also: str = ""
) -> None:
    """``beside``: what the dtypes cost the model named ``also``."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"The same conversations from {memory} of KV cache")
    table.add_column("")
    for s in shown:
        table.add_column(s.dtype, justify="right")
    rows = {
        "sessions at once": [f"{s.sessions_admitted}" for s in shown],
        "4,096-token sessions in 1 GiB": [f"{s.sessions_capacity}" for s in shown],
        "KV bytes per token": [f"{s.kv_bytes_per_token:,.0f}" for s in shown],
        "prefill tokens/s": [f"{s.prefill_tokens_per_s:,.0f}" for s in shown],
        "decode tokens/s": [f"{s.decode_tokens_per_s:,.0f}" for s in shown],
        "all conversations, s": [f"{s.seconds:.1f}" for s in shown],
        "KL to 16 bit, nats": [f"{s.kl_mean:.2g}" for s in shown],
        "same top token": [f"{100 * s.top1_agreement:.1f} %" for s in shown],
        "answers found": [f"{s.answers_found} of {s.answers_total}" for s in shown],
    }
    if beside is not None:
        rows[f"KL of {also}"] = [f"{beside[s.dtype].kl_mean:.2g}" for s in shown]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)
