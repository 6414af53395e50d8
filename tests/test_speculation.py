"""Speculative decoding in the engine: whatever is guessed, answers and cached pages are those of plain decoding."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from helpers.serving import byte_model, byte_tokenizer, engine_of
from helpers.speculating import EAGER, GREEDY, KINDS, PROMPTS, Oracle, json_params, model, oracle, prompt_of, run
from helpers.tiny import tiny_model

from kvbits import LLM
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.engine.speculation import Candidate, SpeculativeConfig, Speculator
from kvbits.engine.speculation.by_model import DraftModelProposer
from kvbits.engine.speculation.methods import draft_model
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.models.load import wrap


@pytest.mark.parametrize("kind", [*KINDS, "grammar"])
def test_answers_are_those_of_plain_decoding(kind: str) -> None:
    params = [json_params() if kind == "grammar" else KINDS[kind]] * len(PROMPTS)
    expected = run(engine_of(model(), batch_invariant=True), PROMPTS, params)
    for seed in range(2):
        engine = oracle(engine_of(model(), batch_invariant=True), PROMPTS, expected, seed)
        assert run(engine, PROMPTS, params) == expected
        stats = engine.stats
        assert stats.generated_tokens == sum(len(a[1]) for a in expected)
        if any(len(a[1]) > 10 for a in expected):
            assert 0.2 < stats.speculation.acceptance < 0.8
            assert stats.steps < 0.8 * max(len(a[1]) for a in expected)


def page_bytes(engine: Engine, seq_id: int) -> list[torch.Tensor]:
    """What each layer stored in each full page of a sequence; what lies between the layers is left out."""
    layout, stored = engine.pool.layout, engine.pages.stored(seq_id)
    found = []
    for page, frames in ((layout.sink, stored.sink), (layout.sealed, stored.sealed)):
        for first in range(0, len(frames), page.frames if page else 1):
            assert page is not None
            for place, layer in zip(page.places, engine.pool.geometry.layers, strict=True):
                size = place.scheme.layer_bytes(layer)
                found.append(engine.pool.buffer[frames[first + place.frame], place.offset : place.offset + size])
    return found


@pytest.mark.parametrize("dtype", ["int8", "int4", "int4+sink:int8"])
def test_cached_pages_hold_the_same_bytes(dtype: str) -> None:
    """Guesses cross page ends again and again; what is sealed, found and shared afterwards knows nothing of them."""
    params = [GREEDY] * len(PROMPTS)
    plain = engine_of(model(), kv_cache_dtype=dtype)
    expected = run(plain, PROMPTS, params)
    engine = oracle(engine_of(model(), kv_cache_dtype=dtype), PROMPTS, expected)
    assert run(engine, PROMPTS, params) == expected
    ours, theirs = engine.pages.stats(), plain.pages.stats()
    assert (ours.free, ours.open, ours.sealed, ours.cached) == (theirs.free, theirs.open, theirs.sealed, theirs.cached)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, expected, strict=True)):
        text = prompt + answer[1]
        pages = []
        for e in (plain, engine):
            assert e.pages.open(10_000 + number, text) == (len(text) - 1) // 64 * 64
            pages.append(page_bytes(e, 10_000 + number))
        assert len(pages[0]) >= 2
        for ours_page, theirs_page in zip(*pages, strict=True):
            assert torch.equal(ours_page, theirs_page)


def test_a_pool_that_is_full_and_a_small_budget() -> None:
    """Guesses give way: to other sequences' frames, to the step's budget; preempted sequences go on as before."""
    params = [GREEDY] * len(PROMPTS)
    expected = run(engine_of(model()), PROMPTS, params)
    size = engine_of(model()).pool.layout.frame_bytes
    for frames, budget in ((20, 256), (22, 8)):
        engine = engine_of(model(), kv_cache_memory=frames * size, max_num_batched_tokens=budget)
        oracle(engine, PROMPTS, expected)
        assert run(engine, PROMPTS, params) == expected
        assert engine.stats.preemptions > 0
        assert engine.stats.speculation.accepted_tokens > 0


def test_a_guess_never_leaves_the_context_or_the_answer() -> None:
    prompt = prompt_of(1000)
    params = dataclasses.replace(GREEDY, max_tokens=None)
    expected = run(engine_of(model()), [prompt], [params])
    assert len(expected[0][1]) == 24
    assert run(oracle(engine_of(model()), [prompt], expected), [prompt], [params]) == expected


def test_several_answers_to_one_prompt() -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=40, temperature=1.0, ignore_eos=True)
    expected = run(engine_of(model()), [PROMPTS[5]], [params])
    engine = engine_of(
        model(),
    )
    engine.speculator = Speculator(Oracle({tuple(PROMPTS[5]): expected[0][1]}), EAGER, engine.stats.speculation)
    assert run(engine, [PROMPTS[5]], [params]) == expected


def test_prompt_lookup_speeds_up_what_repeats() -> None:
    """A model that says one thing only: most steps are saved, and the tokens stay the same."""
    params = [dataclasses.replace(GREEDY, logit_bias={70: 100.0})]
    expected = run(engine_of(model()), [PROMPTS[1]], params)
    engine = Engine(model(), engine_of(model()).config, speculative=EAGER)
    assert run(engine, [PROMPTS[1]], params) == expected
    assert engine.stats.steps < 40
    assert engine.stats.speculation.mean_length > 4
    assert sum(engine.stats.speculation.accepted_at) == engine.stats.speculation.accepted_tokens


# The distribution of sampled tokens


def test_sampled_tokens_follow_the_models_distribution() -> None:
    """Chi-squared: the first three tokens of 3,000 samples with guesses, against exact probabilities.

    Only four tokens can be chosen, and the guess is always the same, so each of its places is kept and lost often.
    """
    bias = dict.fromkeys(range(3, 7), 60.0)
    count, prompt = 3000, PROMPTS[0]
    engine = engine_of(model(), kv_cache_memory=64 << 20, max_num_seqs=64)

    class Fixed(Oracle):
        def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
            return [[4, 5, 3, 4][: c.count] for c in candidates]

    engine.speculator = Speculator(Fixed({}), EAGER, engine.stats.speculation)
    params = [SamplingParams(max_tokens=4, temperature=2.0, seed=i, logit_bias=bias) for i in range(count)]
    seen: Counter[tuple[int, ...]] = Counter()
    for first in range(0, count, 500):
        seen.update(tuple(a[1][:3]) for a in run(engine, [prompt] * 500, params[first : first + 500]))
    assert engine.stats.speculation.accepted_tokens > 100
    exact = exact_distribution(prompt, range(3, 7), 3, 2.0)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-6)
    cells = [(seen[key], count * p) for key, p in exact.items()]
    common = [c for c in cells if c[1] >= 5]
    rare = [c for c in cells if c[1] < 5]
    common.append((sum(c[0] for c in rare), sum(c[1] for c in rare)))
    statistic = sum((o - e) ** 2 / e for o, e in common if e > 0)
    degrees = len(common) - 1
    assert degrees >= 8
    # The seeds are fixed, so this is one draw: beyond this bound lies one in 10,000 (Wilson and Hilferty).
    bound = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < bound, (statistic, degrees, bound)


def exact_distribution(prompt: list[int], choices: Sequence[int], depth: int, temperature: float) -> dict:
    """Probability of every continuation of ``depth`` tokens, from teacher-forced logits."""
    engine = engine_of(model(), kv_cache_memory=64 << 20)
    level: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        following = {}
        for path, p in level.items():
            tokens = [*prompt, *path]
            ((_, logits),) = engine.teacher_forced(tokens, len(tokens) - 1)
            weights = torch.softmax(logits[-1, list(choices)].double() / temperature, -1)
            following |= {(*path, t): p * float(w) for t, w in zip(choices, weights, strict=True)}
        level = following
    return level


# A draft model


def with_draft(draft: LoadedModel, **options: object) -> Engine:
    engine = engine_of(model())
    config = SpeculativeConfig(
        **{"method": "draft_model", "model": "x", "kv_cache_dtype": "int8", "kv_cache_memory": "4MiB",
           "num_speculative_tokens": 4, "adaptive": False, **options}
    )  # fmt: skip
    proposer = draft_model(draft, config, model(), engine.config)
    engine.speculator = Speculator(proposer, config, engine.stats.speculation)
    return engine


def pages_of(engine: Engine) -> DraftModelProposer:
    assert engine.speculator is not None
    proposer = engine.speculator._proposer
    assert isinstance(proposer, DraftModelProposer)
    return proposer


@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalties"])
def test_a_draft_model(kind: str) -> None:
    """The model itself as its draft guesses nearly all, another one hardly anything; the answers are the same."""
    params = [KINDS[kind]] * len(PROMPTS)
    expected = run(engine_of(model()), PROMPTS, params)
    good = with_draft(model())
    assert run(good, PROMPTS, params) == expected
    assert good.stats.speculation.acceptance > (0.01 if kind == "penalties" else 0.95)
    other = wrap(tiny_model("llama", seed=7, vocab_size=259, max_position_embeddings=1024), byte_tokenizer(), "other")
    bad = with_draft(other)
    assert run(bad, PROMPTS, params) == expected
    assert bad.stats.speculation.acceptance < 0.2
    for engine in (good, bad):
        proposer = pages_of(engine)
        proposer.pages.check()
        assert proposer.pages.sequences() == []


def test_a_draft_model_without_room_guesses_nothing() -> None:
    params = [GREEDY] * len(PROMPTS)
    expected = run(engine_of(model()), PROMPTS, params)
    engine = with_draft(model(), kv_cache_memory=10 * engine_of(model()).pool.layout.frame_bytes)
    assert run(engine, PROMPTS, params) == expected
    assert 0 < engine.stats.speculation.drafts < sum(len(a[1]) for a in expected) / 4
    assert engine.stats.speculation.failures == 0


def test_a_draft_model_that_always_fails_ends_speculation_only() -> None:
    class Failing(LoadedModel):
        def forward(self, *args: object) -> torch.Tensor:
            raise RuntimeError("no draft today")

    broken = Failing(**{f.name: getattr(model(), f.name) for f in dataclasses.fields(model())})
    params = [GREEDY] * len(PROMPTS)
    engine = with_draft(broken)
    assert run(engine, PROMPTS, params) == run(engine_of(model()), PROMPTS, params)
    assert engine.stats.speculation.drafts == 0
    # All together, and then each alone; nothing is guessed for them any more.
    assert engine.stats.speculation.failures == 1 + len(PROMPTS)


def test_a_draft_model_must_speak_the_same_tokens() -> None:
    config = SpeculativeConfig(method="draft_model", model="x")
    with pytest.raises(ConfigError, match="has 97 tokens, tiny has 259"):
        draft_model(wrap(tiny_model("llama"), None, "small"), config, model(), engine_of(model()).config)
    short = wrap(tiny_model("llama", vocab_size=259, max_position_embeddings=256), byte_tokenizer(), "short")
    with pytest.raises(ConfigError, match="context of 256 tokens; 1024 are needed"):
        draft_model(short, config, model(), engine_of(model()).config)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_tokens(["more"])
    odd = dataclasses.replace(model(), tokenizer=tokenizer, name="odd")
    with pytest.raises(ConfigError, match="numbers the token 'more' unlike"):
        draft_model(model(), config, odd, engine_of(model()).config)


# The model itself on half of its codes


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_the_model_itself_on_coarser_pages(kind: str) -> None:
    # Weights at random give nearly all tokens the same chance, so that any rounding chooses another one: cooler.
    sampled = SamplingParams(max_tokens=120, temperature=0.3, seed=5, ignore_eos=True)
    params = [sampled if kind == "sampled" else dataclasses.replace(GREEDY, max_tokens=120)] * len(PROMPTS)
    expected = run(engine_of(model(), kv_cache_dtype="int8h"), PROMPTS, params)
    config = engine_of(model(), kv_cache_dtype="int8h").config
    speculative = SpeculativeConfig(method="self", num_speculative_tokens=4, adaptive=False)
    engine = Engine(model(), config, speculative=speculative)
    assert run(engine, PROMPTS, params) == expected
    # Four bits of the keys are enough for many guesses, and not for all.
    assert 0.3 < engine.stats.speculation.acceptance < 1.0
    assert engine.stats.steps < 100
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        text = prompt + answer[1]
        assert engine.pages.lookup(text) == (len(text) - 1) // 64 * 64


def test_the_model_itself_needs_pages_with_a_draft_form() -> None:
    with pytest.raises(ConfigError, match="'int8' has none, 'int8h' has"):
        Engine(model(), engine_of(model()).config, speculative=SpeculativeConfig(method="self"))


# What a user writes and sees


def test_options() -> None:
    assert SpeculativeConfig.of(None) is None
    assert SpeculativeConfig.of("ngram") == SpeculativeConfig()
    text = json.dumps({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3})
    assert SpeculativeConfig.of(text) == SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_max=3)
    for wrong, message in (
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ({"tokens": 3}, "no option 'tokens'; choose from method, num_speculative_tokens"),
        ({"method": "magic"}, "'magic'; choose from ngram, draft_model, self"),
        ({"num_speculative_tokens": 64}, "num_speculative_tokens is 64"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5"),
        ({"method": "draft_model"}, "needs a model"),
        ({"model": "m"}, "takes no model"),
        ({"adaptive": 1}, "adaptive is 1"),
        ({"kv_cache_memory": "much"}, "much"),
    ):
        with pytest.raises(ConfigError, match=message):
            SpeculativeConfig.of(wrong)


def test_the_library_reports() -> None:
    assert LLM(byte_model(), kv_cache_dtype="int8", kv_cache_memory="4MiB", progress=False).speculation is None
    llm = LLM(
        byte_model(),
        kv_cache_dtype="int8",
        kv_cache_memory="4MiB",
        progress=False,
        speculative_config={"adaptive": False},
    )
    output = llm.generate([PROMPTS[1]], dataclasses.replace(GREEDY, logit_bias={70: 100.0}))[0]
    assert len(output.outputs[0].token_ids) == 150
    stats = llm.speculation
    assert stats is not None
    found = stats.as_json()
    assert found["num_accepted_tokens"] == 150 - 1 - (llm.engine.stats.steps - 1)
    assert found["mean_acceptance_length"] == 1 + found["num_accepted_tokens"] / found["num_drafts"]
    assert f"{stats.acceptance:.0%}" in stats.line()
