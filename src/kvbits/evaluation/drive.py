"""Drive an engine with a set of prompts and time every step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbits.engine.engine import Engine
from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.errors import RequestError


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    ``prompt_tokens`` are the rows that belong to prompts, ``decoded`` the sequences that got another token after
    their first, ``begun`` those that got their first.
    """

    seconds: float
    prompt_tokens: int
    decoded: int
    begun: int
    deltas: tuple[Delta, ...]

    @property
    def sequences(self) -> int:
        """Sequences that got a token in this step: all of them hold their whole context in the cache."""
        return self.decoded + self.begun


def drive(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[Step]:
    """Queue ``prompts`` (ids ``"0"``, ``"1"``, ...) and yield each step until all have ended or the caller stops.

    What is still running when the caller stops is aborted. Raises ``RequestError`` when a prompt cannot be served.
    """
    names = [str(index) for index in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(prompt, params, request_id=name)
    started: set[str] = set()
    try:
        while engine.has_unfinished():
            before = engine.stats.computed_tokens
            begin = time.perf_counter()
            deltas = engine.step()
            seconds = time.perf_counter() - begin
            for delta in deltas:
                if delta.error is not None:
                    raise RequestError(delta.error)
            got = {d.request_id for d in deltas if d.token_ids}
            decoded = len(got & started)
            # A step stores a token for each that it brings to a sequence under way, guessed ones included.
            rows = engine.stats.computed_tokens - before
            rows -= sum(len(d.token_ids) for d in deltas if d.request_id in started)
            started |= got
            yield Step(seconds, rows, decoded, len(got) - decoded, tuple(deltas))
    finally:
        for name in names:
            engine.abort(name)
        while engine.has_unfinished():
            engine.step()
