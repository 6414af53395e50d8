"""The batched sampler against the one for the CPU: the same logits after every option, the same draws."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from helpers.tiny_engine import loaded, make, one_thread, original, packed, prompt_of, tokens
from test_sampler import FILTERS, VOCAB, logits_of, naive, state_of
from torch import Tensor

from kvbits.engine import answer
from kvbits.engine.device_sampler import adjust_rows, on_cpu, pick, sample_on_device
from kvbits.engine.params import SamplingParams
from kvbits.engine.sampler import NO_TOKEN_LEFT, NOT_FINITE, adjust, sample
from kvbits.engine.sampling import SamplingState
from kvbits.kernels import default_backend
from kvbits.models import LoadedModel

__all__ = ["loaded", "one_thread", "original", "packed"]

OPTIONS: dict[str, dict[str, object]] = {
    "nothing": {},
    "bias": {"logit_bias": {3: 2.5, 7: -100}},
    "repetition": {"repetition_penalty": 1.7},
    "counts": {"frequency_penalty": 0.3, "presence_penalty": -0.7},
    "allowed": {"allowed_token_ids": [1, 5, 5, 9, 30]},
    "early": {"min_tokens": 8, "max_tokens": 20, "stop_token_ids": [2, 4]},
    "all": {
        "logit_bias": {3: 2.5, 30: -1.5}, "repetition_penalty": 0.8, "frequency_penalty": 0.3, "presence_penalty": 0.4,
        "allowed_token_ids": [1, 2, 3, 5, 9, 30], "min_tokens": 8, "max_tokens": 20, "stop_token_ids": [2, 4],
    },
}  # fmt: skip


@dataclass
class Matcher:
    """A grammar that allows every third token, or fails."""

    fails: bool = False
    finished: bool = False
    accepted: list[int] = field(default_factory=list)

    def allowed(self) -> Tensor:
        if self.fails:
            raise ValueError("a broken grammar")
        return torch.arange(VOCAB) % 3 == 0

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def states(**more: object) -> list[SamplingState]:
    return [state_of([3, 9, 9], (4, 9, 2), **options, **more) for options in OPTIONS.values()]


def bounded(fails: bool = False, **params: object) -> SamplingState:
    state = state_of(**params)
    state.params.__dict__["grammar"] = object()
    state.matcher = Matcher(fails)
    return state


def test_every_option_changes_the_logits_as_on_the_cpu() -> None:
    rows = [*states(), bounded(), bounded(logit_bias={3: 5.0, 4: 50.0})]
    logits = torch.stack([logits_of(i) for i in range(len(rows))])
    before = logits.clone()
    adjusted, errors = adjust_rows(logits, rows)
    assert torch.equal(logits, before)
    assert not errors
    for raw, got, state in zip(logits, adjusted, rows, strict=True):
        assert torch.equal(got, adjust(raw, state))
    assert len({tuple(row) for row in (adjusted - logits).tolist()}) == len(rows)  # each did something of its own


@pytest.mark.parametrize("filters", FILTERS)
def test_the_same_random_numbers_give_the_same_tokens(filters: tuple[float, int, float, float]) -> None:
    names = ("temperature", "top_k", "top_p", "min_p")
    rows, twins = (states(seed=3, **dict(zip(names, filters, strict=True))) for _ in range(2))
    for step in range(40):
        logits = torch.stack([logits_of(100 * step + i) for i in range(len(rows))])
        got = [s.token for s in sample_on_device(logits, rows)]
        assert got == [s.token for s in sample(logits, twins)]
        for state, twin, token in zip(rows, twins, got, strict=True):
            state.observe(token)
            twin.observe(token)


def test_filters_of_a_batch_do_not_meet() -> None:
    """Every row's own filters, in one call; draws follow each row's distribution (chi-square, 0.1 %)."""
    rows = [state_of(temperature=t, top_k=k, top_p=p, min_p=m, seed=i) for i, (t, k, p, m) in enumerate(FILTERS[:8])]
    logits = logits_of(11, spread=1.0).repeat(len(rows), 1)
    draws = 3000
    found = [Counter[int]() for _ in rows]
    for _ in range(draws):
        for counter, sampled in zip(found, sample_on_device(logits, rows), strict=True):
            counter[sampled.token] += 1
    for counter, filters in zip(found, FILTERS[:8], strict=True):
        expected = [p * draws for p in naive(logits[0].tolist(), *filters)]
        assert all(expected[token] > 0 for token in counter)
        bins = [(counter[i], e) for i, e in enumerate(expected) if e >= 5]
        bins.append((draws - sum(c for c, _ in bins), max(draws - sum(e for _, e in bins), 1e-9)))
        chi = sum((c - e) ** 2 / e for c, e in bins if e > 1e-6)
        freedom = max(len([e for _, e in bins if e > 1e-6]) - 1, 1)
        assert chi < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3, filters


def test_top_k_and_top_p_over_a_large_vocabulary() -> None:
    """More kept tokens than the CPU puts in order: the same set, and draws from all of it."""
    logits = logits_of(9, 3000, 0.7).repeat(400, 1)
    rows = [state_of(temperature=1.3, top_k=700, top_p=0.8, seed=i) for i in range(400)]
    kept = {i for i, p in enumerate(naive(logits[0].tolist(), 1.3, 700, 0.8, 0.0)) if p > 0}
    tokens = {s.token for s in sample_on_device(logits, rows)}
    assert tokens <= kept
    assert len(tokens) > 200


def test_a_rounded_sum_never_draws_what_has_no_weight() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0]]).repeat(4, 1)
    uniform = torch.tensor([[0.0], [1 / 3], [0.5], [1.0]], dtype=torch.float64)
    assert pick(weights, uniform).tolist() == [1, 4, 4, 4]


def test_logprobs_are_those_of_the_cpu() -> None:
    options = ({"logprobs": 5}, {}, {"logprobs": 0}, {"logprobs": 3, "temperature": 0.0, "logit_bias": {0: 50}})
    rows, twins = ([state_of(seed=1, **o) for o in options] for _ in range(2))
    logits = torch.stack([logits_of(i) for i in range(len(rows))])
    for got, expected in zip(sample_on_device(logits, rows), sample(logits, twins), strict=True):
        assert got.token == expected.token
        assert (got.logprobs is None) == (expected.logprobs is None)
        for token, entry in (expected.logprobs or {}).items():
            assert got.logprobs is not None
            assert list(got.logprobs) == list(expected.logprobs or {})
            assert got.logprobs[token].rank == entry.rank
            assert got.logprobs[token].logprob == pytest.approx(entry.logprob, abs=1e-6)


def test_what_fails_is_its_own_row() -> None:
    rows = [
        state_of(seed=1), state_of(seed=2), bounded(fails=True), state_of(seed=4),
        state_of(allowed_token_ids=[2], min_tokens=1, max_tokens=2, stop_token_ids=[2]),
    ]  # fmt: skip
    logits = torch.stack([logits_of(i) for i in range(len(rows))])
    logits[0, 5] = math.nan
    errors = [s.error for s in sample_on_device(logits, rows)]
    assert errors == [NOT_FINITE, None, "ValueError: a broken grammar", None, NO_TOKEN_LEFT]


def test_a_step_that_fails_uses_up_no_number() -> None:
    rows, twin = [state_of(seed=2, top_p=0.5)], state_of(seed=2)
    with pytest.raises((IndexError, RuntimeError)):
        sample_on_device(logits_of(0)[None, :0], rows)
    sample_on_device(logits_of(0)[None], rows)
    twin.uniform()
    assert rows[0].uniform() == twin.uniform()


def test_what_goes_the_cpus_way_is_named() -> None:
    both = bounded(min_tokens=2, max_tokens=4, stop_token_ids=[0])
    assert on_cpu(both) == "a grammar together with min_tokens or bad_words"
    assert on_cpu(bounded()) is None
    logits = torch.stack([logits_of(0), logits_of(1), logits_of(2)])
    got = sample_on_device(logits, [state_of(temperature=0.0), both, state_of(temperature=0.0)])
    assert [s.token for s in got[::2]] == logits[::2].argmax(-1).tolist()
    assert got[1].token % 3 == 0
    assert got[1].token != 0


@pytest.mark.parametrize("method", [None, "ngram"])
def test_an_engine_chooses_the_same_tokens(
    packed: LoadedModel, monkeypatch: pytest.MonkeyPatch, method: str | None
) -> None:
    """Requests of all kinds in one batch, guesses too."""
    wishes: list[dict[str, object]] = [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.8}, *OPTIONS.values()]
    params = [SamplingParams(**{"max_tokens": 12, "seed": i, **wish}) for i, wish in enumerate(wishes)]
    prompts = [prompt_of(5 + 13 * i, i) for i in range(len(wishes))]
    answers = []
    for choose in (sample, sample_on_device):
        monkeypatch.setattr(answer, "sample", choose)
        llm = make(packed, default_backend(), "int8", speculative_config=method)
        answers.append(tokens(llm, prompts, params))
    assert answers[0] == answers[1]
