"""Models whose attention stands beside recurrent layers: every answer is that of transformers' own ``generate``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from helpers.hybrids import PROMPTS, TOKENS, answers, check_bits, expected, hybrid_engine, loaded_of, own_logits, prompt
from helpers.serving import engine_of, packed_byte_model
from helpers.tiny import HYBRIDS, tiny_model
from helpers.tiny_engine import one_thread

from kvbits import SamplingParams
from kvbits.codecs.states import StateLayout
from kvbits.engine.engine import Engine
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.engine.speculation.proposer import Candidate
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.load import wrap

__all__ = ["one_thread"]

SOME = ("qwen3_next", "lfm2", "bamba")
"""One of each kind of recurrent layer."""


@pytest.mark.parametrize("family", HYBRIDS)
def test_greedy_text_is_transformers_own(family: str) -> None:
    """Three sequences at once, their prompts in parts, and slots that nobody owns hold no numbers."""
    assert answers(hybrid_engine(family), PROMPTS) == expected(family)


@pytest.mark.parametrize("family", HYBRIDS)
def test_int8_loses_little(family: str) -> None:
    tokens = prompt(200, 3)
    right = own_logits(family, tokens).log_softmax(-1)
    engine = hybrid_engine(family, kv_cache_dtype="int8")
    got = torch.cat([logits for _, logits in engine.teacher_forced(tokens, 0)]).log_softmax(-1)
    loss = (right.exp() * (right - got)).sum(-1).mean()
    assert loss < 1e-3, f"{family}: {loss:.2e} nats"
    print(f"{family}: {loss:.2e} nats")


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("family", SOME)
def test_prompts_may_be_cut_anywhere(family: str, chunk: int) -> None:
    engine = hybrid_engine(family, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    assert answers(engine, PROMPTS, max_tokens=8) == [answer[:8] for answer in expected(family)]


@pytest.mark.parametrize("family", SOME)
def test_sequences_go_on_from_what_others_left(family: str) -> None:
    engine = hybrid_engine(family)
    right = expected(family)[2]
    assert answers(engine, [PROMPTS[2]]) == [right]
    before = engine.stats.cached_tokens
    assert answers(engine, [PROMPTS[2]]) == [right]
    assert engine.stats.cached_tokens - before == 128, "the last full page of the prompt"
    # A second turn finds the last page that the first one's answer has filled.
    turn = [*PROMPTS[2], *right[:62]]
    before = engine.stats.cached_tokens
    assert answers(engine, [turn], max_tokens=3) == [right[62:65]]
    assert engine.stats.cached_tokens - before == 192


@pytest.mark.parametrize("family", SOME)
def test_preempted_sequences_go_on_where_they_were(family: str) -> None:
    pool = hybrid_engine(family).pool
    frames, slot = 7 * pool.layout.frame_bytes, pool.states.slot_bytes
    layout = StateLayout.of(pool.geometry, 4)
    slots = next(n for n in range(99, 0, -1) if layout.slots(frames + n * slot, 3) == n)
    engine = hybrid_engine(family, max_num_seqs=3, kv_cache_memory=frames + slots * slot)
    assert (engine.pool.num_frames, engine.pool.states.num_slots) == (7, slots)
    assert answers(engine, PROMPTS) == expected(family)
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("caching", [True, False])
def test_several_answers_to_one_prompt(caching: bool) -> None:
    options = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    engine = hybrid_engine("lfm2", enable_prefix_caching=caching)
    got = answers(engine, [PROMPTS[2]], **options)
    assert len({tuple(answer) for answer in got}) == 3, "three answers"
    assert engine.stats.cached_tokens == (256 if caching else 0)
    # By another way: all of the prompt at once, one sequence after another.
    alone = hybrid_engine("lfm2", enable_prefix_caching=False, max_num_batched_tokens=1000, max_num_seqs=1)
    assert answers(alone, [PROMPTS[2]], **options) == got


def test_an_abort_gives_the_slot_back() -> None:
    engine = hybrid_engine("lfm2", max_num_seqs=2, enable_prefix_caching=False)
    for number in range(4):
        engine.add_request(PROMPTS[0], SamplingParams(max_tokens=50), request_id=f"{number}")
    engine.step()
    assert engine.pages.states.stats().sequences == 2
    engine.abort("0")
    engine.pages.check()
    assert engine.pages.states.stats().sequences == 1
    while engine.has_unfinished():
        engine.step()
    assert engine.pages.states.stats().sequences == 0


@pytest.mark.parametrize("family", SOME)
def test_guesses_that_fail_leave_no_trace(family: str) -> None:
    """Of every guess two tokens are right and two are not."""
    speculative = SpeculativeConfig(method="ngram", num_speculative_tokens=4, adaptive=False)
    engine = Engine(loaded_of(family), hybrid_engine(family).config, speculative=speculative)
    right = dict(zip(map(tuple, PROMPTS), expected(family), strict=True))

    def propose(candidates: Sequence[Candidate]) -> list[list[int]]:
        coming = [right[tuple(c.request.prompt)][c.request.num_output :][: c.count] for c in candidates]
        return [[*tokens[:2], *(token ^ 1 for token in tokens[2:])] for tokens in coming]

    engine.speculator._proposer.propose = propose
    assert answers(engine, PROMPTS) == expected(family)
    tried = engine.stats.speculation
    assert tried.draft_tokens > tried.accepted_tokens > 0.4 * tried.draft_tokens, tried
    assert engine.pages.states.stats().sequences == 0, "guesses give their slots back"


@pytest.mark.parametrize("family", ["qwen3_next-dense", "lfm2", "bamba", "falcon_h1", "nemotron_h"])
def test_answers_that_do_not_depend_on_others_to_the_last_bit(family: str) -> None:
    check_bits(family, kv_cache_dtype="int8")


def test_experts_that_round_by_rows_are_refused() -> None:
    loaded = packed_byte_model(family="qwen3_next", fused=False)
    with pytest.raises(UnsupportedError, match=r"the layer 'model\.layers\.0\.mlp\.gate' multiplies"):
        engine_of(loaded, batch_invariant=True)


def test_slots_are_counted_in_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    loaded = loaded_of("bamba")
    states = hybrid_engine("bamba").pool.states
    assert states.slot_bytes == 2 * (192 * 4 * 4 + 8 * 16 * 16 * 4), "two layers, in float32"
    engine = engine_of(loaded, kv_cache_memory=1 << 20, max_num_seqs=8)
    used = engine.pool.states.num_bytes + engine.pool.buffer.nbytes
    assert engine.pool.states.num_slots == 17
    assert 0 <= (1 << 20) - used < engine.pool.layout.frame_bytes
    assert "2 recurrent layers (0, 2) run as transformers' code" in engine.recurrent
    with caplog.at_level(logging.WARNING):
        engine = engine_of(loaded, kv_cache_memory=200_000, max_num_seqs=8)
    assert "At most 4 sequences run at once, not 8" in caplog.text
    assert answers(engine, [PROMPTS[1]] * 6, max_tokens=3) == [expected("bamba")[1][:3]] * 6
    with pytest.raises(ConfigError, match="the recurrent layers keep"):
        engine_of(loaded, kv_cache_memory=30_000)


def test_a_layer_that_does_not_go_on_from_its_states_is_refused() -> None:
    model = tiny_model("bamba")
    own = type(model.model.layers[0].mamba).forward

    def forgetful(hidden_states: torch.Tensor, cache_params: object = None, **rest: object) -> torch.Tensor:
        if cache_params is not None:
            cache_params.layers[0].has_previous_state[0] = False
        return own(model.model.layers[0].mamba, hidden_states, cache_params=cache_params, **rest)

    model.model.layers[0].mamba.forward = forgetful
    with pytest.raises(UnsupportedError, match="BambaMixer does not go on from its states"):
        wrap(model, None, "bamba")


assert TOKENS + 131 > 192, "an answer crosses the end of a page"
