"""``kvbits bench``: prefill and decode speed of the cache, through the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile
from kvbits.cli.session import Bar, load, machine, tokens_of
from kvbits.config import AUTO

if TYPE_CHECKING:
    from kvbits.evaluation.speed import Speed


def bench(
    model: options.Model,
    kv_cache_dtype: options.KVCacheDtypes = None,
    kv_policy: options.KVPolicies = None,
    context: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Prompt of each sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that decode together.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Timed decode steps.")] = 32,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text for the prompts. Default: Python's language reference.")
    ] = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    state_dtype: options.StateDtype = AUTO,
    disable_mla: options.DisableMLA = False,
    speculative_config: options.Speculative = None,
    dtype: options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Time prefill, then decode steps with all sequences running (the median step). Prefix caching is off."""
    results = JsonFile(json_file)
    dtypes = options.cache_dtypes(kv_cache_dtype, kv_policy)
    from kvbits.engine.config import step_tokens
    from kvbits.engine.precheck import check_geometry, check_model, check_states
    from kvbits.engine.speculation.config import SpeculativeConfig
    from kvbits.evaluation.documents import reference_text
    from kvbits.evaluation.windows import check_text, read_text

    speculative = SpeculativeConfig.of(speculative_config)
    content = reference_text() if text is None else read_text(text)
    outline = check_model(model, dtypes, dtype=dtype, weights=weights, device=device, context=context + new_tokens)
    check_states(outline, state_dtype, speculative)
    check_text([content], context + batch, 1)
    from kvbits.evaluation.compare import policies_of
    from kvbits.evaluation.speed import distinct_prompts, longest_sequence, measure_speed

    longest = context + new_tokens
    loaded = load(
        model, dtype, threads, weights, device, trust_remote_code, max_model_len=longest, disable_mla=disable_mla,
        check=lambda geometry, _: check_geometry(geometry, dtypes, state_dtype=state_dtype, speculative=speculative),
    )  # fmt: skip
    policies = policies_of(loaded, dtypes, context)
    budget = step_tokens(max_num_batched_tokens, device)
    longest_sequence(loaded, context, batch, new_tokens, budget)
    prompts = distinct_prompts(tokens_of(loaded, content), context, batch)
    found = []
    for policy in policies:
        with Bar(batch * (context + new_tokens), policy.label) as advance:
            found.append(measure_speed(loaded, policy, prompts, new_tokens, budget, advance, speculative, state_dtype))
    _print(found)
    for speed in found:
        if speed.speculation is not None:
            kept, length = speed.speculation["acceptance_rate"], speed.speculation["mean_acceptance_length"]
            print(f"{speed.dtype}: {kept:.0%} of the guessed tokens kept, {length:.2f} tokens a step with a guess")
    rows = [speed.as_json() | {"compute_dtype": dtype, "weights": weights} | machine(device) for speed in found]
    flat = rows[0] if len(rows) == 1 else {}
    results.write({**flat, "results": rows, "model": loaded.name})


def _print(found: list[Speed]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found[0].batch} sequences of {found[0].context} tokens")
    for name in ("KV cache", "prefill tok/s", "decode tok/s", "step ms", "KV bytes/token", "peak memory MiB"):
        table.add_column(name, justify="left" if name == "KV cache" else "right")
    for speed in found:
        table.add_row(
            speed.dtype,
            f"{speed.prefill_tokens_per_s:,.0f}",
            f"{speed.decode_tokens_per_s:,.1f}",
            f"{speed.decode_step_ms:.1f}",
            f"{speed.kv_bytes_per_token:,.0f}",
            f"{speed.peak_rss_bytes / 2**20:,.0f}",
        )
    Console().print(table)
