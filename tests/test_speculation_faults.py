"""Speculation at its edges: a prompt's last token alone in a step, guesses that fail, sequences that begin again."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.serving import engine_of, packed_byte_model
from helpers.speculating import GREEDY, KINDS, Oracle, json_params, prompt_of, run

from kvbits.engine.batch import StepBatch
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.engine.speculation import Candidate, SpeculativeConfig, Speculator
from kvbits.engine.speculation.by_model import ModelProposer
from kvbits.engine.speculation.methods import draft_model
from kvbits.models import LoadedModel

METHODS = ("ngram", "draft_model", "self")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return packed_byte_model()


def dtype_of(method: str | None) -> str:
    return "int8h" if method == "self" else "int8"


def guessing(loaded: LoadedModel, method: str, **options: object) -> Engine:
    """An engine that guesses all it can by ``method``."""
    engine = engine_of(loaded, **{"kv_cache_dtype": dtype_of(method), **options})
    model = {"model": "x"} if method == "draft_model" else {}
    config = SpeculativeConfig(
        method=method, num_speculative_tokens=4, adaptive=False, prompt_lookup_min=1, kv_cache_memory="4MiB", **model
    )
    if method != "draft_model":
        return Engine(loaded, engine.config, speculative=config)
    engine.speculator = Speculator(draft_model(loaded, config, loaded, engine.config), config, engine.stats.speculation)
    return engine


def reports(engine: Engine, prompt: list[int], params: SamplingParams, **options: object) -> list[tuple[object, ...]]:
    """Tokens, text, log-probabilities and those of the prompt, of each of the request's sequences."""
    engine.add_request(prompt, params, request_id="r", **options)
    found: dict[int, list] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None, delta
            if delta.request_id == "r":
                found.setdefault(delta.index, []).append(delta)
        engine.pages.check()
    return [
        (
            [t for d in deltas for t in d.token_ids],
            "".join(d.text for d in deltas),
            [entry for d in deltas for entry in d.logprobs or ()],
            [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None],
        )
        for _, deltas in sorted(found.items())
    ]


# One token of the prompt is left: the sequence decodes before it has answered anything


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 64, 65, 256, 257, 258, 513])
def test_the_last_token_of_a_prompt_alone_in_a_step(loaded: LoadedModel, method: str, length: int) -> None:
    """With ``prompt_logprobs``, without, and several answers; budget 256."""
    prompt = (prompt_of(19) * 30)[:length]
    for changes in ({"prompt_logprobs": 2}, {}, {"prompt_logprobs": 0, "n": 3}, {"n": 2, "logprobs": 1}):
        params = SamplingParams(**{"max_tokens": 30, "temperature": 0.3, "seed": 4, "ignore_eos": True, **changes})
        expected = reports(engine_of(loaded, kv_cache_dtype=dtype_of(method)), prompt, params)
        engine = guessing(loaded, method)
        assert reports(engine, prompt, params) == expected, changes
        assert engine.stats.speculation.drafts > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_grammar_from_the_last_token_of_a_prompt_on(loaded: LoadedModel, method: str) -> None:
    params = dataclasses.replace(json_params(), prompt_logprobs=1)
    prompt = prompt_of(257)
    expected = reports(engine_of(loaded, kv_cache_dtype=dtype_of(method)), prompt, params)
    assert reports(guessing(loaded, method), prompt, params) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [129, 193])
def test_a_prefix_that_leaves_one_token(loaded: LoadedModel, method: str, length: int) -> None:
    """All but one token of the prompt come from the cache."""
    prompt = (prompt_of(19) * 30)[:length]
    params = dataclasses.replace(GREEDY, max_tokens=30)
    expected = reports(engine_of(loaded, kv_cache_dtype=dtype_of(method)), prompt, params)
    engine = guessing(loaded, method)
    for _ in range(2):
        assert reports(engine, prompt, params) == expected
    assert engine.stats.cached_tokens == length - 1


# A sequence that begins again


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_sequence_that_begins_again_with_the_same_tokens(
    loaded: LoadedModel, method: str, logprobs: int | None
) -> None:
    """Preempted after it was guessed for, at every length of the answer, so also where one token is left to read."""
    prompt = (prompt_of(19) * 30)[:120]
    params = dataclasses.replace(GREEDY, max_tokens=80, prompt_logprobs=logprobs)
    expected = reports(engine_of(loaded, kv_cache_dtype=dtype_of(method)), prompt, params)
    for budget in (19, 64, 256):
        engine = guessing(loaded, method, max_num_batched_tokens=budget)
        engine.add_request(prompt, params, request_id="r")
        tokens: list[int] = []
        again = 0
        while engine.has_unfinished():
            decoding = engine.scheduler.decoding()
            if decoding and decoding[0].num_output >= again:
                again = decoding[0].num_output + 2
                engine.speculator.propose(decoding, engine._states)
                engine.scheduler.requeue(decoding[0])
            for delta in engine.step():
                assert delta.error is None
                tokens += delta.token_ids
            engine.pages.check()
        assert tokens == expected[0][0]
        assert engine.stats.speculation.failures == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_guess_that_no_step_followed_is_made_again(loaded: LoadedModel, method: str) -> None:
    """A step may go to somebody else; what was guessed for the others is guessed once more, and alike."""
    engine = guessing(loaded, method)
    engine.add_request((prompt_of(19) * 30)[:120], GREEDY)
    for _ in range(70):  # over the end of a page
        engine.step()
        guesses = []
        for _ in range(3):
            engine.speculator.propose(engine.scheduler.decoding(), engine._states)
            guesses.append([list(r.draft) for r in engine.scheduler.running])
            engine.pages.check()
        assert guesses[0] == guesses[1] == guesses[2]
    assert engine.stats.speculation.failures == 0


# Guesses that fail


PROMPTS = [prompt_of(n, n) for n in (40, 63, 64, 190)]
PARAMS = [dataclasses.replace(GREEDY, max_tokens=60), KINDS["sampled"], KINDS["logprobs"], KINDS["sampled"]]


def break_guesses(engine: Engine, fails: Callable[[int], bool]) -> None:
    """Fail before or after each round of guessing whose number ``fails`` names."""
    proposer = engine.speculator._proposer
    rounds = 0

    def broken(plain: Callable, *args: object) -> object:
        nonlocal rounds
        rounds += 1
        if not fails(rounds):
            return plain(*args)
        if rounds % 2:
            plain(*args)
        raise RuntimeError("no guess today")

    if not isinstance(proposer, ModelProposer):
        whole = proposer.propose
        proposer.propose = lambda candidates: broken(whole, candidates)
        return
    plain = proposer._runner.run

    def run_drafts(batch: StepBatch) -> torch.Tensor:
        # The model's own steps go through the same runner where it guesses for itself.
        own = proposer._draft and not batch.layout.draft
        return plain(batch) if own else broken(plain, batch)

    proposer._runner.run = run_drafts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one", "first", "some", "all"])
def test_failed_guesses_cost_no_answer(loaded: LoadedModel, method: str, kind: str) -> None:
    expected = run(engine_of(loaded, kv_cache_dtype=dtype_of(method)), PROMPTS, PARAMS)
    engine = guessing(loaded, method)
    rng = random.Random(3)
    rules = {
        "one": lambda n: n == 12,
        "first": lambda n: n == 1,
        "some": lambda n: rng.random() < 0.1,
        "all": lambda n: True,
    }
    break_guesses(engine, rules[kind])
    assert run(engine, PROMPTS, PARAMS) == expected
    stats = engine.stats.speculation
    assert stats.failures > 0
    if kind in ("one", "first"):
        assert stats.failures == 1
        assert stats.drafts > 10
    if kind == "all":
        assert stats.drafts == 0
        assert stats.failures < 30
    pages = engine.pages.stats()
    assert (pages.open, pages.sealed) == (0, 0)
    proposer = engine.speculator._proposer
    if method == "draft_model":
        proposer.pages.check()
        assert proposer.pages.sequences() == []


def test_only_the_sequence_whose_guess_fails_goes_without(loaded: LoadedModel) -> None:
    expected = run(engine_of(loaded), PROMPTS, PARAMS)
    engine = guessing(loaded, "ngram")
    asked: list[int] = []

    class Picky(Oracle):
        def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
            if any(c.request.prompt == PROMPTS[1] for c in candidates):
                raise ValueError("not this one")
            asked.extend(c.request.seq_id for c in candidates)
            return super().propose(candidates)

    by_prompt = {tuple(p): a[1] for p, a in zip(PROMPTS, expected, strict=True)}
    config = SpeculativeConfig(adaptive=False, num_speculative_tokens=4)
    engine.speculator = Speculator(Picky(by_prompt), config, engine.stats.speculation)
    assert run(engine, PROMPTS, PARAMS) == expected
    assert set(asked) == {0, 2, 3}
    assert len(asked) > 40
    # With all of them, and alone; then never again.
    assert engine.stats.speculation.failures == 2


@pytest.mark.parametrize("wrong", ["too long", "too few", "cost"])
def test_a_proposer_that_breaks_its_word(loaded: LoadedModel, wrong: str) -> None:
    class Wrong(Oracle):
        def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
            return [[5] * (c.count + 1) for c in candidates] if wrong == "too long" else []

    expected = run(engine_of(loaded), PROMPTS, PARAMS)
    engine = guessing(loaded, "ngram")
    config = SpeculativeConfig(adaptive=wrong == "cost")
    engine.speculator = Speculator(Wrong({}), config, engine.stats.speculation)
    if wrong == "cost":

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        engine.speculator.cost.observe = fail
    assert run(engine, PROMPTS, PARAMS) == expected
    assert engine.stats.speculation.failures > 0
    assert engine.stats.speculation.drafts == 0
