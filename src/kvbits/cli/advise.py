"""``kvbits advise``: which cache dtype to use for a model, a text, and a number of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile
from kvbits.cli.session import Bar, load, machine, note, tokens_of
from kvbits.config import AUTO

if TYPE_CHECKING:
    from kvbits.evaluation.advice import Candidate
    from kvbits.models import LoadedModel


def advise(
    model: options.Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A UTF-8 text like those that will be served.")],
    memory: Annotated[
        str, typer.Option("--kv-cache-memory", "--memory", metavar="SIZE", help="Bytes of the KV cache, such as 1GiB.")
    ],
    context: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens of one session.")],
    sessions: Annotated[int, typer.Option(min=1, metavar="N", help="Sessions at once.")] = 1,
    kv_cache_dtype: options.KVCacheDtypes = None,
    kv_policy: options.KVPolicies = None,
    state_dtype: options.StateDtype = AUTO,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text for KL.")] = 2,
    window: Annotated[int, typer.Option(min=4, metavar="TOKENS", help="Tokens of one window.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Documents of each long-context task.")] = 1,
    speed_context: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Context at which decoding is timed, at most --context.")
    ] = 1024,
    speed_batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sequences that are timed, at most --sessions.")
    ] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Decode steps that are timed.")] = 32,
    disable_mla: options.DisableMLA = False,
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished parts here (JSON lines); never run them again.")
    ] = None,
    json_file: options.JsonFile = None,
) -> None:
    """Try a ladder of dtypes (and your policies) and recommend one.

    Each is measured on the text (KL), on questions about long documents made of it, and in decode speed on this
    machine; how many sessions fit follows from the memory.
    """
    results = JsonFile(json_file)
    from kvbits.config import parse_bytes
    from kvbits.evaluation.windows import check_text, read_text

    content, size = read_text(text), parse_bytes(memory)
    from kvbits.engine.precheck import check_geometry, check_model, check_states

    asked, longest = options.named(kv_cache_dtype, kv_policy), max(context, window)
    outline = check_model(model, asked, dtype="float32", weights=weights, device=device, context=longest)
    check_states(outline, state_dtype)
    check_text([content], window, windows)
    from kvbits.evaluation.advice import advice, ladder
    from kvbits.evaluation.compare import policies_of, with_states
    from kvbits.evaluation.laboratory import Laboratory
    from kvbits.evaluation.resume import ResumeCache
    from kvbits.evaluation.selection import Sizes
    from kvbits.evaluation.survey import survey

    resume_cache = ResumeCache(resume)

    def loaded_in(dtype: str) -> LoadedModel:
        return load(
            model, dtype, threads, weights, device, trust_remote_code, max_model_len=longest, disable_mla=disable_mla,
            check=lambda geometry, _: check_geometry(geometry, asked, context=longest, state_dtype=state_dtype),
        )  # fmt: skip

    loaded = loaded_in("float32")
    rungs = ["bf16"] if kv_cache_dtype else ladder(loaded.geometry)
    policies = policies_of(loaded, list(dict.fromkeys([*rungs, *asked])), longest)
    policies = with_states(loaded, policies, state_dtype)
    served = loaded_in("bfloat16")
    laboratory = Laboratory(
        loaded, policies, resume_cache, Bar, served=served, served_dtype="bfloat16", state_dtype=state_dtype
    )
    sizes = Sizes(window, windows, task_context=context, samples=samples)
    shape = (min(speed_context, context), min(speed_batch, sessions), new_tokens)
    candidates = survey(laboratory, content, tokens_of(loaded, content), size, context, sizes, shape)
    sentence = advice(candidates, sessions, context, size)
    _print(candidates, context, shape)
    print(sentence)
    results.write(
        {
            "model": loaded.name,
            "text": str(text),
            "memory_bytes": size,
            "context": context,
            "sessions": sessions,
            "advice": sentence,
            "candidates": [c.as_json() for c in candidates],
            **machine(device),
        }
    )


def _print(candidates: Sequence[Candidate], context: int, shape: tuple[int, int, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    from kvbits.evaluation.advice import pareto
    from kvbits.evaluation.survey import TASKS

    best = pareto(candidates)
    table = Table(title="* no other is as good in sessions, KL and speed, and better in one")
    names = ("KV cache", "", "bits", "all bits", "KL", "right", "log-prob. lost", "sessions", "decode tok/s", "verdict")
    for name in names:
        table.add_column(name, justify="left" if name in ("KV cache", "", "verdict") else "right")
    for c in candidates:
        table.add_row(
            c.dtype,
            "*" if c in best else "",
            f"{c.bits:.2f}",
            f"{c.effective_bits:.2f}",
            f"{c.kl:.2g}",
            f"{100 * c.right:.0f} %",
            f"{c.task_loss:+.3f}",
            f"{c.sessions}",
            f"{c.decode:,.0f}",
            c.level.words,
        )
    Console().print(table)
    note(
        f"right and log-prob. lost (nats a token): {' and '.join(TASKS)} at {context} tokens; "
        f"decode: {shape[1]} sequences at {shape[0]} tokens on this machine"
    )
