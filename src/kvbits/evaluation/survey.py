"""A ladder of cache dtypes measured for one purpose: fidelity, long documents, decode speed, sessions that fit."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.evaluation.advice import Candidate
from kvbits.evaluation.laboratory import Laboratory
from kvbits.evaluation.parts import FIDELITY, LAYERS
from kvbits.evaluation.selection import Sizes, choose, run_tasks
from kvbits.evaluation.speed import distinct_prompts, longest_sequence, measure_speed
from kvbits.planning.core import plan

TASKS = ("needle", "kv-retrieval")
"""The questions about long documents that are asked."""


def survey(
    laboratory: Laboratory,
    text: str,
    tokens: Sequence[int],
    memory: int,
    context: int,
    sizes: Sizes,
    speed: tuple[int, int, int],
) -> list[Candidate]:
    """What every policy of ``laboratory`` holds and costs.

    ``tokens`` are those of ``text``; ``memory`` bytes are for sessions of ``context`` tokens; ``speed`` is the context,
    batch and number of decode steps that are timed. Raises ``ConfigError`` when the text is too short or a context too
    long.
    """
    run_tasks(laboratory, choose(",".join((FIDELITY, LAYERS, *TASKS)), True, None), tokens, text, sizes)
    served, found = laboratory.served or laboratory.loaded, []
    at, batch, new_tokens = speed
    room = longest_sequence(served, at, batch, new_tokens, laboratory.max_num_batched_tokens)
    prompts = distinct_prompts(tokens, at, batch)
    geometry = served.geometry.stored_in(laboratory.state_dtype)
    with laboratory.bar(len(laboratory.policies) * batch * room, "speed") as advance:
        for policy, row in zip(laboratory.policies, laboratory.results(), strict=True):
            timed = measure_speed(
                served, policy, prompts, new_tokens, progress=advance, state_dtype=laboratory.state_dtype
            )
            held = plan(geometry, [policy], memory, [context]).schemes[0].contexts[0]
            found.append(Candidate.of(row, held.sessions, timed.decode_tokens_per_s, held.session_bytes))
    return found
