"""``kvbits advise``: which cache dtype to use for a model, a text, and a number of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile
from kvbits.cli.session import Bar, load, machine, note, tokens_of
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.evaluation.advice import Candidate
    from kvbits.models import LoadedModel

_TASKS = ("needle", "kv-retrieval")


def advise(
    model: options.Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A UTF-8 text like those that will be served.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of the KV cache, for example 1GiB.")],
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of one session.")],
    sessions: Annotated[int, typer.Option(metavar="N", help="Sessions at once.")] = 1,
    kv_cache_dtype: options.KVCacheDtypes = None,
    kv_policy: options.KVPolicies = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows of the text for KL.")] = 2,
    window: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of one window.")] = 2048,
    samples: Annotated[int, typer.Option(metavar="N", help="Documents of each long-context task.")] = 1,
    speed_context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Context at which decoding is timed, at most --context.")
    ] = 1024,
    speed_batch: Annotated[int, typer.Option(metavar="N", help="Sequences that are timed, at most --sessions.")] = 4,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Decode steps that are timed.")] = 32,
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
    from kvbits.evaluation.windows import read_text

    content, size = read_text(text), parse_bytes(memory)
    for name, value in (
        ("--context", context), ("--sessions", sessions), ("--speed-batch", speed_batch), ("--new-tokens", new_tokens),
        ("--speed-context", speed_context),
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    from kvbits.evaluation.advice import ladder
    from kvbits.evaluation.compare import check_dtypes
    from kvbits.evaluation.laboratory import Laboratory
    from kvbits.evaluation.ledger import Ledger
    from kvbits.evaluation.menu import Sizes, choose, run_menu

    ledger = Ledger(resume)
    menu = choose(",".join(("fidelity", "layers", *_TASKS)), True, None)
    loaded = load(model, "float32", threads, trust_remote_code=trust_remote_code)
    asked = [*(kv_cache_dtype or ()), *(f"policy:{path}" for path in kv_policy or ())]
    dtypes = list(dict.fromkeys([*(ladder(loaded) if not kv_cache_dtype else ("bf16",)), *asked]))
    check_dtypes(loaded, dtypes, max(context, window))
    sizes = Sizes(window, windows, task_context=context, samples=samples)
    served = load(model, "bfloat16", threads, trust_remote_code=trust_remote_code)
    laboratory = Laboratory(loaded, dtypes, ledger, Bar, served=served, served_dtype="bfloat16")
    tokens = tokens_of(loaded, content)
    run_menu(laboratory, menu, tokens, content, sizes)
    shape = (min(speed_context, context), min(speed_batch, sessions), new_tokens)
    speeds = _speeds(served, dtypes, tokens, *shape)
    candidates = _candidates(laboratory.results(), loaded, size, context, speeds)
    advice = _advice(loaded, candidates, size, context, sessions)
    _print(candidates, context, shape)
    print(advice)
    results.write(
        {
            "model": loaded.name,
            "text": str(text),
            "memory_bytes": size,
            "context": context,
            "sessions": sessions,
            "advice": advice,
            "candidates": [c.as_json() for c in candidates],
            **machine(),
        }
    )


def _speeds(
    loaded: LoadedModel, dtypes: Sequence[str], tokens: Sequence[int], context: int, batch: int, new_tokens: int
) -> dict[str, float]:
    """Decode speed of every dtype, tokens a second of all sequences."""
    from kvbits.evaluation.speed import distinct_prompts, longest_sequence, measure_speed

    room = longest_sequence(loaded, context, batch, new_tokens, 512)
    prompts = distinct_prompts(tokens, context, batch)
    found = {}
    with Bar(len(dtypes) * batch * room, "speed") as advance:
        for dtype in dtypes:
            found[dtype] = measure_speed(loaded, dtype, prompts, new_tokens, progress=advance).decode_tokens_per_s
    return found


def _candidates(
    rows: Sequence[dict[str, Any]], loaded: LoadedModel, memory: int, context: int, speeds: dict[str, float]
) -> list[Candidate]:
    from kvbits.evaluation.advice import Candidate, sessions_in
    from kvbits.evaluation.verdict import Level

    levels = {level.words: level for level in Level}
    return [
        Candidate(
            dtype=row["dtype"],
            bits=row["bits_per_element"],
            effective_bits=row["effective_bits_per_element"],
            kl=row["kl_mean"],
            task_loss=sum(row["tasks"][t]["logprob_lost_per_token"]["mean"] for t in _TASKS) / len(_TASKS),
            right=sum(row["tasks"][t]["exact"] for t in _TASKS) / len(_TASKS),
            sessions=sessions_in(loaded, row["dtype"], memory, context),
            decode=speeds[row["dtype"]],
            level=levels[row["verdict"]],
        )
        for row in rows
    ]


def _advice(loaded: LoadedModel, candidates: Sequence[Candidate], memory: int, context: int, sessions: int) -> str:
    from kvbits.evaluation.advice import RULE, bytes_for, recommend
    from kvbits.evaluation.verdict import Level

    chosen = recommend(candidates, sessions)
    if chosen is not None:
        flag = f"--kv-policy {chosen.dtype[7:]}" if chosen.dtype.startswith("policy:") else chosen.dtype
        how = flag if flag.startswith("--") else f"--kv-cache-dtype {flag}"
        return (
            f"Use {how}: {chosen.level.words} (KL {chosen.kl:.2g}), {chosen.sessions} sessions of {context} tokens "
            f"where {sessions} were asked for, {chosen.bits:.2f} bits an element. {RULE}"
        )
    usable = [c for c in candidates if c.level is not Level.BAD]
    if not usable:
        return f"Nothing to recommend: every dtype tried has the verdict '{Level.BAD.words}'."
    least = min(usable, key=lambda c: bytes_for(loaded, c.dtype, sessions, context))
    need = bytes_for(loaded, least.dtype, sessions, context)
    return (
        f"Nothing that is fit to use holds {sessions} sessions of {context} tokens in {memory} bytes. The nearest is "
        f"{least.dtype}: {least.sessions} sessions, or {need} bytes ({need / 2**20:,.0f} MiB) for all {sessions}."
    )


def _print(candidates: Sequence[Candidate], context: int, shape: tuple[int, int, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    from kvbits.evaluation.advice import pareto

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
        f"right and log-prob. lost (nats a token): {' and '.join(_TASKS)} at {context} tokens; "
        f"decode: {shape[1]} sequences at {shape[0]} tokens on this machine"
    )
