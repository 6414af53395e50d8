"""Whatever is raised in whatever part of a step ends the guilty request alone; what is nobody's fault ends none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers.serving import engine_of, packed_byte_model
from helpers.speculating import KINDS, oracle, prompt_of

from kvbits.engine import answer as answer_module
from kvbits.engine.detokenize import TokenDecoder
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.engine.request_state import RequestState
from kvbits.engine.scheduler import Scheduler
from kvbits.errors import OutOfPages
from kvbits.models import LoadedModel

BAD = prompt_of(90, 77)
PROMPTS = [prompt_of(n, n) for n in (40, 63, 200)]
PARAMS = [KINDS["logprobs"], KINDS["sampled"], dataclasses.replace(KINDS["greedy"], max_tokens=70)]


class Trouble(Exception):
    pass


class BadMatcher:
    """A grammar's place that fails after a few tokens, when it is asked or when it is told."""

    finished = False

    def __init__(self, where: str) -> None:
        self.where = where
        self.told = 0

    def allowed(self) -> torch.Tensor:
        if self.where == "allowed" and self.told == 3:
            raise Trouble("allowed")
        return torch.ones(259, dtype=torch.bool)

    def accept(self, token: int) -> None:
        self.told += 1
        if self.where == "accept" and self.told == 3:
            raise Trouble("accept")


class BadGrammar:
    def __init__(self, where: str) -> None:
        self.where = where
        self.started = 0

    def start(self) -> BadMatcher:
        self.started += 1
        if self.where == "start" and self.started == 2:
            raise Trouble("start")
        return BadMatcher(self.where)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return packed_byte_model()


def is_bad(engine: Engine, seq_id: int) -> bool:
    state = engine._states.get(seq_id)
    return state is not None and state.request.prompt == BAD


def wrap_pages(engine: Engine, name: str, when: Callable[[], bool] = lambda: True) -> None:
    """Let a method of the page manager fail for the bad request."""
    plain = getattr(engine.pages, name)

    def broken(seq_id: int, *args: object, **options: object) -> object:
        if is_bad(engine, seq_id) and when():
            raise Trouble(name)
        return plain(seq_id, *args, **options)

    setattr(engine.pages, name, broken)


def guilty(engine: Engine, where: str, monkeypatch: pytest.MonkeyPatch) -> SamplingParams:
    """Arrange that the request with the prompt ``BAD`` fails at ``where``; returns its parameters."""
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    if where in ("allowed", "accept"):
        return dataclasses.replace(params, grammar=BadGrammar(where))
    if where in ("open", "restore", "reserve", "commit", "frames_needed"):
        wrap_pages(engine, where)
    elif where == "late commit":
        wrap_pages(engine, "commit", lambda: engine.stats.steps > 6)
    elif where == "late reserve":
        wrap_pages(engine, "reserve", lambda: engine.stats.steps > 6)
    elif where == "model":
        plain = engine._runner.run

        def run(batch: object) -> torch.Tensor:
            if any(is_bad(engine, r.seq_id) and engine.pages.reserved(r.seq_id) for r in engine.scheduler.running):
                raise Trouble(where)
            return plain(batch)

        engine._runner.run = run
    elif where == "text":
        return dataclasses.replace(params, stop=["never said"])
    elif where == "prompt report":
        plain_report = answer_module._report_prompt

        def report(state: RequestState, *rest: object) -> None:
            if state.request.prompt == BAD:
                raise Trouble(where)
            plain_report(state, *rest)

        monkeypatch.setattr(answer_module, "_report_prompt", report)
    return params


WHERE = (
    "allowed", "accept", "open", "restore", "reserve", "late reserve", "commit", "late commit", "frames_needed",
    "model", "text", "prompt report",
)  # fmt: skip


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[tuple[object, ...]]:
    """Tokens, text, reason, log-probabilities and error of each."""
    found: dict[str, list] = {}
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(prompt, params, request_id=str(number))
        if prompt == BAD and params.stop_strings:
            spoil_text(engine)
    steps = 0
    while engine.has_unfinished():
        steps += 1
        assert steps < 2000
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append(delta)
        engine.pages.check()
    pages = engine.pages.stats()
    assert (pages.open, pages.sealed) == (0, 0)
    for left in (engine._states, engine._groups, engine.scheduler.running, engine.scheduler.waiting):
        assert not left
    return [
        (
            [t for d in deltas for t in d.token_ids],
            "".join(d.text for d in deltas),
            [d.finish_reason for d in deltas if d.finish_reason],
            [entry for d in deltas for entry in d.logprobs or ()],
            deltas[-1].error,
        )
        for _, deltas in sorted(found.items())
    ]


def spoil_text(engine: Engine) -> None:
    """The bad request's tokens have no text."""
    state = next(v for v in engine._states.values() if v.request.prompt == BAD)

    def decode(ids: list[int]) -> str:
        raise Trouble("text")

    state._detokenizer._decode = TokenDecoder(decode)


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_one_request_fails_alone(
    loaded: LoadedModel, where: str, guesses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = list(zip(PROMPTS, PARAMS, strict=True))
    expected = run(engine_of(loaded), good)
    engine = engine_of(loaded, max_num_batched_tokens=100, kv_offload_size=1 << 20)
    if guesses:
        bad_params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, ignore_eos=True)
        known = [*expected, *run(engine_of(loaded), [(BAD, bad_params)])]
        oracle(engine, [*PROMPTS, BAD], [(None, a[0]) for a in known])
    params = guilty(engine, where, monkeypatch)
    found = run(engine, [*good[:2], (BAD, params), good[2]])
    assert [*found[:2], found[3]] == expected
    assert found[2][2] == ["error"]
    assert "Trouble: " in found[2][4]
    assert run(engine, good) == expected


@pytest.mark.parametrize("where", ["schedule", "model", "answer"])
def test_what_is_nobodys_fault_ends_nobody(loaded: LoadedModel, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something fails now and then, for several requests together: all are answered as ever."""
    good = list(zip(PROMPTS, PARAMS, strict=True))
    expected = run(engine_of(loaded), good)
    engine = engine_of(loaded, max_num_batched_tokens=100)
    owner, name = {
        "schedule": (engine.scheduler, "_admit"),
        "model": (engine._runner, "run"),
        "answer": (answer_module, "sample"),
    }[where]
    plain = getattr(owner, name)
    calls = 0

    def sometimes(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        many = len(engine.scheduler.running) > 1 and engine.scheduler.suspect() is None
        if many and calls % 5 == 0:
            raise Trouble(where)
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, sometimes)
    assert run(engine, good) == expected
    assert calls > 20


def test_a_plan_that_breaks_off_in_the_middle_loses_nobody(loaded: LoadedModel) -> None:
    """Some already preempted, some admitted, some planned, when it fails; the pool is small."""
    good = list(zip(PROMPTS * 2, PARAMS * 2, strict=True))
    expected = run(engine_of(loaded), good)
    size = engine_of(loaded).pool.layout.frame_bytes
    for every in (3, 4, 7):
        engine = engine_of(loaded, kv_cache_memory=16 * size, max_num_batched_tokens=64)
        for name in ("_preempt", "_advance", "_open"):
            fail_after(engine.scheduler, name, every)
        assert run(engine, good) == expected


def fail_after(scheduler: Scheduler, name: str, every: int) -> None:
    """Let every so many calls of a method fail when they are done, unless one request is suspected already."""
    plain = getattr(scheduler, name)
    calls = 0

    def broken(*args: object) -> object:
        nonlocal calls
        calls += 1
        result = plain(*args)
        if calls % every == 0 and scheduler.suspect() is None:
            raise OutOfPages("a bug")
        return result

    setattr(scheduler, name, broken)


def test_a_request_that_cannot_be_made_leaves_nothing(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    params = SamplingParams(n=3, grammar=BadGrammar("start"))
    with pytest.raises(Trouble):
        engine.add_request(PROMPTS[0], params, request_id="r")
    assert not engine.has_unfinished()
    good = list(zip(PROMPTS, PARAMS, strict=True))
    assert run(engine, good) == run(engine_of(loaded), good)


@pytest.mark.parametrize("name", ["save", "load"])
def test_an_offload_tier_that_raises_anything_is_no_requests_fault(loaded: LoadedModel, name: str) -> None:
    good = list(zip(PROMPTS * 2, PARAMS * 2, strict=True))
    expected = run(engine_of(loaded), good)
    size = engine_of(loaded).pool.layout.frame_bytes
    engine = engine_of(loaded, kv_cache_memory=16 * size, kv_offload_size=1 << 20)
    calls = 0

    def broken(*args: object) -> object:
        nonlocal calls
        calls += 1
        raise MemoryError("no memory to copy")

    setattr(engine.pages._cache.tier._mover, name, broken)
    for _ in range(2):
        assert run(engine, good) == expected
    assert calls > 0
