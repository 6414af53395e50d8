"""The sampler against a straightforward rendering of the same rules, and its draws against the distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbits.engine.params import SamplingParams
from kvbits.engine.sampler import adjust, distribution, draw, falling, likeliest, report, sample
from kvbits.engine.sampling import SamplingState
from kvbits.errors import RequestError

VOCAB = 40


def logits_of(seed: int, vocab: int = VOCAB, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def state_of(prompt: list[int] | None = None, output: tuple[int, ...] = (), index: int = 0, **params) -> SamplingState:
    state = SamplingState(SamplingParams(**params), index, prompt or [])
    for token in output:
        state.observe(token)
    return state


def naive(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Probabilities after every filter, in plain Python: sort, walk, renormalise."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    total = sum(weights)
    probs = [w / total for w in weights]
    probs = [p if p >= min_p * max(probs) else 0.0 for p in probs]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k > 0:
        order = order[:top_k]
    mass = sum(probs[i] for i in order)
    kept, walked = [], 0.0
    for i in order:
        if kept and walked >= top_p * mass:
            break
        kept.append(i)
        walked += probs[i]
    mass = sum(probs[i] for i in kept)
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (1.7, 5, 1.0, 0.0),
    (1.0, -1, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.3, 12, 0.7, 0.0),
    (1.3, 12, 0.7, 0.2),
    (1.0, 0, 0.9, 0.05),
    (1.0, 100, 1e-6, 0.0),
    (1.0, 1, 1.0, 0.0),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_keep_what_the_rules_say(filters: tuple[float, int, float, float]) -> None:
    for seed in range(5):
        logits = logits_of(seed)
        weights, ids = distribution(logits, *filters)
        full = torch.zeros(VOCAB)
        full[torch.arange(VOCAB) if ids is None else ids] = weights
        torch.testing.assert_close(full / full.sum(), torch.tensor(naive(logits.tolist(), *filters)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocab", [300, 5000])
def test_top_p_over_a_large_vocabulary_is_exact_without_a_full_sort(vocab: int) -> None:
    for spread, top_p in [(8.0, 0.5), (2.0, 0.9), (0.1, 0.99), (0.0, 0.5)]:
        logits = logits_of(3, vocab, spread)
        weights, ids = distribution(logits, 1.0, 0, top_p, 0.0)
        expected = torch.tensor(naive(logits.tolist(), 1.0, 0, top_p, 0.0))
        assert ids is not None
        # float32 sums: the set may differ by the token on its very edge
        assert abs(len(ids) - int((expected > 0).sum())) <= 1 + 1e-4 * vocab
        assert float(torch.softmax(logits, -1)[ids].sum()) >= top_p - 1e-5
        assert weights.min() >= expected[expected > 0].min() * 0.5 * float(weights.sum())


@pytest.mark.parametrize("count", [1, 255, 256, 257, 999, 2999, 3000])
def test_the_likeliest_tokens_of_equal_ones_the_first(count: int) -> None:
    # multiples of 1/64: most values come many times
    values = torch.round(64 * torch.softmax(logits_of(5, 3000, 0.5), -1) * 3000) / 64
    probs, ids = likeliest(values, count)
    expected = sorted(range(3000), key=lambda i: (-values[i], i))[:count]
    assert torch.equal(values[ids], probs)
    if count > 256:
        assert ids.tolist() == sorted(expected)
    else:
        assert probs.tolist() == values[expected].tolist()
    assert falling(values).tolist() == sorted(values.tolist(), reverse=True)


def test_top_k_beyond_the_head_then_top_p() -> None:
    logits = logits_of(9, 3000, 0.7)
    weights, ids = distribution(logits, 1.3, 700, 0.8, 0.0)
    full = torch.zeros(3000)
    full[ids] = weights
    torch.testing.assert_close(
        full / full.sum(), torch.tensor(naive(logits.tolist(), 1.3, 700, 0.8, 0.0)), atol=1e-6, rtol=0
    )


@settings(max_examples=100, deadline=None)
@given(prompt=st.lists(st.integers(0, 300), max_size=200), output=st.lists(st.integers(0, 300), max_size=200))
def test_tokens_are_counted_as_they_come(prompt: list[int], output: list[int]) -> None:
    state = state_of(prompt, tuple(output[:50]), repetition_penalty=1.1)
    assert sorted(state.seen().tolist()) == sorted({*prompt, *output[:50]})
    for token in output[50:]:
        state.observe(token)
    assert sorted(state.seen().tolist()) == sorted({*prompt, *output})
    tokens, counts = state.generated()
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == Counter(output)


@pytest.mark.parametrize("filters", FILTERS[:8])
def test_draws_follow_the_distribution(filters: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = filters
    logits = logits_of(11, spread=1.0)
    expected = naive(logits.tolist(), *filters)
    state = state_of(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=5)
    draws = 20_000
    counts = [0] * VOCAB
    for _ in range(draws):
        counts[sample(logits[None], [state])[0].token] += 1
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0.0)
    # tokens that are expected fewer than five times go into one bin, as the chi-square test needs
    bins = [(c, p * draws) for c, p in zip(counts, expected, strict=True) if p * draws >= 5]
    rest = [(c, p * draws) for c, p in zip(counts, expected, strict=True) if 0 < p * draws < 5]
    if rest:
        bins.append((sum(c for c, _ in rest), sum(e for _, e in rest)))
    chi = sum((c - e) ** 2 / e for c, e in bins)
    freedom = len(bins) - 1
    assert freedom > 0
    # Wilson-Hilferty: the upper 0.1 % of the chi-square distribution; the seed is fixed, so this is no lottery
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit, (chi, limit, freedom)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 0.0])
    assert [draw(weights, u) for u in (0.0, 0.24, 0.25, 0.7, 0.75, 0.999)] == [1, 1, 2, 2, 4, 4]
    assert draw(weights, 1.0) == 4


def test_greedy_takes_the_likeliest_and_the_batch_does_not_matter() -> None:
    logits = torch.stack([logits_of(i) for i in range(6)])
    rows = [{"temperature": 0.0} if i % 2 else {"temperature": 1.0, "seed": i} for i in range(6)]
    together = [s.token for s in sample(logits, [state_of(**r) for r in rows])]
    alone = [sample(logits[i : i + 1], [state_of(**r)])[0].token for i, r in enumerate(rows)]
    assert together == alone
    assert together[1::2] == logits.argmax(-1).tolist()[1::2]


def test_a_seed_fixes_the_stream_and_each_of_n_has_its_own() -> None:
    logits = torch.zeros(1, 1000)

    def stream(**options) -> list[int]:
        state = state_of(**options)
        return [sample(logits, [state])[0].token for _ in range(20)]

    assert stream(seed=1) == stream(seed=1)
    assert stream(seed=1) != stream(seed=2)
    assert stream(seed=1) != stream(seed=1, index=1)
    assert stream(seed=-1) == stream(seed=2**64 - 1)
    assert stream() != stream()


def test_penalties_and_bias() -> None:
    logits = logits_of(2)
    state = state_of(
        [3, 4, 4],
        (4, 7, 7),
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 5, 9: -9},
    )
    expected = logits.tolist()
    expected[7] += 5
    expected[9] -= 9
    for token in (3, 4, 7):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[4] -= 0.3 + 0.2
    expected[7] -= 0.3 + 0.2 * 2
    before = logits.clone()
    torch.testing.assert_close(adjust(logits, state), torch.tensor(expected))
    assert torch.equal(logits, before)


def test_a_penalty_sees_the_tokens_that_come_later() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = 1.0
    state = state_of([0], temperature=0.0, presence_penalty=2.0)
    tokens = []
    for _ in range(2):
        tokens.append(sample(logits, [state])[0].token)
        state.observe(tokens[-1])
    assert tokens == [2, 0]
    repeated = state_of([2], temperature=0.0, repetition_penalty=5.0)
    assert len(repeated.seen()) == 1
    repeated.observe(3)
    assert sorted(repeated.seen().tolist()) == [2, 3]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = logits_of(8)
    state = state_of(temperature=0.3, seed=3, logprobs=5, logit_bias={0: 50})
    sampled = sample(logits[None], [state])[0]
    assert sampled.token == 0
    assert sampled.logprobs is not None
    exact = torch.log_softmax(logits.double(), -1)
    order = exact.argsort(descending=True).tolist()
    assert set(sampled.logprobs) == {0, *order[:5]}
    for token, entry in sampled.logprobs.items():
        assert entry.logprob == pytest.approx(float(exact[token]), abs=1e-5)
        assert entry.rank == order.index(token) + 1
    assert set(report(logits, 17, 0)) == {17}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_breaks_only_itself(bad: float) -> None:
    logits = torch.stack([logits_of(0), logits_of(1)])
    logits[0, 5] = bad
    broken, good = sample(logits, [state_of(temperature=0.0), state_of(temperature=0.0)])
    assert broken.error is not None
    assert good.error is None
    assert good.token == int(logits[1].argmax())


def test_masked_tokens_are_fine() -> None:
    logits = torch.full((1, 8), -math.inf)
    logits[0, 3] = 1.0
    assert sample(logits, [state_of(seed=0, top_p=0.5)])[0].token == 3
    assert sample(logits, [state_of(seed=0)])[0].token == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", True),
        ("logprobs", -1),
        ("logprobs", 1000),
        ("seed", 2**64),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("stop", ["x", ""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {1: 101}),
        ("logit_bias", {"a": 1}),
    ],
)
def test_a_bad_parameter_is_named(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "tiny",
    [
        {"temperature": 1e-46},
        {"temperature": 5e-324},
        {"temperature": 1e-40},
        {"temperature": 9e-6},
        {"temperature": 1e-5, "repetition_penalty": 0.001},
        {"temperature": 1e-5, "frequency_penalty": 2, "presence_penalty": 1e-46},
        {"top_p": 1e-46},
        {"top_p": 5e-324, "min_p": 1e-46},
        {"top_k": 1, "min_p": 1.0},
    ],
)
def test_numbers_that_are_nothing_in_float32_give_the_likeliest(tiny: dict[str, float]) -> None:
    logits = torch.linspace(-20.0, 20.0, 50)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    state = state_of([int(logits.argmin())], seed=1, **tiny)
    for _ in range(5):
        sampled = sample(logits[None], [state])[0]
        assert sampled.error is None
        assert sampled.token == int(logits.argmax())


@pytest.mark.parametrize("value", [1e-40, 1e-46, 0.0, -1.0, 11, 10**400, math.inf])
def test_a_repetition_penalty_that_overflows_is_refused(value: float) -> None:
    with pytest.raises(RequestError, match=r"repetition_penalty is .*; it must be a number from 0.001 to 10"):
        SamplingParams(repetition_penalty=value)


def test_parameters_are_normalised() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert params.stop_strings == ("end",)
    assert SamplingParams(stop=None).stop_strings == ()
    assert SamplingParams(temperature=0).plain_greedy
    assert not SamplingParams(temperature=0, logit_bias={1: 1}).plain_greedy
