"""Steps that are planned before the tokens of the step before are there give the answers of those that are not."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers.stress import Stress
from helpers.tiny_engine import PROMPTS, assert_idle, loaded, make, one_thread, original, packed, prompt_of

from kvbits import LLM, SamplingParams
from kvbits.engine.ahead import Ahead
from kvbits.engine.outputs import Delta
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models import LoadedModel

__all__ = ["loaded", "one_thread", "original", "packed"]


class Counted(Ahead):
    """Counts the plans that were used, and those that were void."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm.engine.scheduler)
        self.count: Counter[str] = Counter()

    def take(self):
        there, found = self._made is not None, super().take()
        self.count["used"] += found is not None
        self.count["void"] += there and found is None
        return found


def drive(llm: LLM, asks: dict[int, list[tuple[list[int], SamplingParams]]], aborts: dict[int, str]) -> list[Delta]:
    """All deltas; requests come, and go, before the steps of these numbers."""
    engine, deltas, step, number = llm.engine, [], 0, 0
    while engine.has_unfinished() or step <= max(asks):
        for prompt, params in asks.get(step, ()):
            engine.add_request(prompt, params, request_id=f"r{number}")
            number += 1
        if step in aborts:
            engine.abort(aborts[step])
        deltas += engine.step()
        engine.pages.check()
        step += 1
    assert_idle(llm)
    return deltas


def both(model: LoadedModel, frames: int, **options) -> tuple[LLM, LLM, Counted]:
    plain, llm = (make(model, ReferenceBackend(), "int8", frames=frames, **options) for _ in range(2))
    llm.engine._ahead = Counted(llm)
    return plain, llm, llm.engine._ahead


def by_request(deltas: list[Delta]) -> dict[tuple[str, int], tuple]:
    """Tokens, text, log-probabilities and end of each sequence."""
    found: dict[tuple[str, int], list[Delta]] = {}
    for delta in deltas:
        found.setdefault((delta.request_id, delta.index), []).append(delta)
    return {
        key: (
            [t for d in ds for t in d.token_ids], "".join(d.text for d in ds), [d.logprobs for d in ds if d.token_ids],
            ds[-1].finish_reason, ds[-1].stop_reason, ds[-1].error,
        )
        for key, ds in found.items()
    }  # fmt: skip


def test_answers_are_the_same(packed: LoadedModel) -> None:
    """Ends by tokens, stop strings and lengths, several sequences of a prompt, penalties, requests that come late."""
    kinds = [
        {"temperature": 0.0, "max_tokens": 70, "ignore_eos": True},
        {"temperature": 0.9, "seed": 1, "max_tokens": 90, "stop": ["a", "e"]},
        {"temperature": 0.8, "seed": 2, "max_tokens": 40, "n": 3, "logprobs": 2},
        {"temperature": 1.0, "seed": 3, "max_tokens": 30, "presence_penalty": 0.7, "prompt_logprobs": 1},
        {"temperature": 0.7, "seed": 4, "max_tokens": 80, "ignore_eos": True, "min_tokens": 5},
    ]
    asks = [(prompt, SamplingParams(**kinds[i % len(kinds)])) for i, prompt in enumerate(PROMPTS)]
    plain, llm, ahead = both(packed, 400)
    late = {0: asks[:4], 20: asks[4:6], 21: asks[6:]}
    got, expected = (by_request(drive(engine, late, {})) for engine in (llm, plain))
    assert got == expected
    assert ahead.count["used"] > 30
    assert ahead.count["void"] > 5
    assert llm.engine.stats.computed_tokens == plain.engine.stats.computed_tokens
    assert llm.engine.scheduler.shares.counts() == {}


def test_a_request_that_is_cancelled_takes_no_other_along(packed: LoadedModel) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    asks = {0: [(prompt, params) for prompt in PROMPTS[:5]]}
    plain, llm, ahead = both(packed, 400)
    got, expected = (by_request(drive(engine, asks, {30: "r1", 41: "r4"})) for engine in (llm, plain))
    assert got == expected
    assert [end for *_, end, _, _ in got.values()].count("abort") == 2
    assert ahead.count["void"] >= 2


def test_a_pool_too_small_for_all(packed: LoadedModel) -> None:
    """Who has to give its pages back is preempted as before."""
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    plain, llm, ahead = both(packed, 16)
    asks = {0: [(prompt_of(60 + 20 * i, i), params) for i in range(4)]}
    got, expected = (by_request(drive(engine, asks, {})) for engine in (llm, plain))
    assert got == expected
    assert llm.engine.stats.preemptions == plain.engine.stats.preemptions > 0
    assert ahead.count["used"] > 20


def test_what_fails_while_planning_ahead_is_left_to_the_step(
    packed: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, llm, ahead = both(packed, 400)
    pages, left = llm.engine.pages, iter([True] * 40 + [False] + [True] * 10 + [False] + [True] * 9999)
    reserve = pages.reserve

    def failing(seq_id: int, count: int, tentative: bool = False) -> None:
        if planning and not next(left):
            raise OSError("no space left on device")
        reserve(seq_id, count, tentative)

    planning, own = [], ahead.make

    def making() -> None:
        planning.append(True)
        own()
        planning.clear()

    monkeypatch.setattr(pages, "reserve", failing)
    monkeypatch.setattr(ahead, "make", making)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    asks = {0: [(prompt, params) for prompt in PROMPTS[:3]]}
    assert by_request(drive(llm, asks, {})) == by_request(drive(plain, asks, {}))
    assert ahead.count["used"] > 25


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_load_with_faults(seed: int) -> None:
    stress = Stress(seed, "none", "llama")
    stress.engine._ahead = Ahead(stress.engine.scheduler)
    assert stress.run()["equal answers"] > 0
