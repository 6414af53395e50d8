"""Multi-head latent attention on cached latents: every answer is that of transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.hybrids import PROMPTS, answers, check_bits, prompt
from helpers.latents import Choices, all_experts, expected, latent_engine, loaded_of, own_logits
from helpers.serving import engine_of
from helpers.tiny import LATENTS, tiny_model
from helpers.tiny_engine import one_thread

from kvbits.engine.engine import Engine
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.engine.speculation.proposer import Candidate
from kvbits.errors import UnsupportedError
from kvbits.models.load import wrap

__all__ = ["one_thread"]

SOME = ("deepseek_v3", "minicpm3")
"""With interleaved rotary channels and experts, and without."""


@pytest.mark.parametrize("family", LATENTS)
def test_greedy_text_is_transformers_own(family: str) -> None:
    """Three sequences at once, their prompts in parts."""
    assert loaded_of(family).geometry.latent
    assert answers(latent_engine(family), PROMPTS) == expected(family)


@pytest.mark.parametrize("family", LATENTS)
def test_int8_loses_little(family: str) -> None:
    tokens, changes = prompt(200, 3), all_experts(family)
    right = own_logits(family, tokens, **changes).log_softmax(-1)
    loaded = wrap(tiny_model(family, **changes), None, family)
    engine = engine_of(loaded, kv_cache_dtype="int8", max_num_batched_tokens=100)
    got = torch.cat([logits for _, logits in engine.teacher_forced(tokens, 0)]).log_softmax(-1)
    loss = (right.exp() * (right - got)).sum(-1).mean()
    print(f"{family}: {loss:.2e} nats")
    assert loss <= 1e-3, f"{family}: {loss:.2e} nats"


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_what_int8_loses_more_where_routers_choose_is_their_choice(family: str) -> None:
    """Two experts of four: one token of hundreds that goes to others is most of the loss."""
    tokens, model = prompt(200, 3), tiny_model(family)
    loaded, choices = wrap(model, None, family), Choices(model)

    def run(dtype: str) -> torch.Tensor:
        engine = engine_of(loaded, kv_cache_dtype=dtype, max_num_batched_tokens=100)
        return torch.cat([logits for _, logits in engine.teacher_forced(tokens, 0)]).log_softmax(-1)

    right, chosen = run("bf16"), choices.take()
    choices.give()
    assert torch.equal(run("bf16"), right)
    choices.take()
    got = run("int8")
    assert all(map(torch.equal, choices.take(), chosen))
    loss = (right.exp() * (right - got)).sum(-1).mean()
    print(f"{family}: {loss:.2e} nats")
    assert loss <= 1e-3, f"{family}: {loss:.2e} nats"


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("family", SOME)
def test_prompts_may_be_cut_anywhere(family: str, chunk: int) -> None:
    engine = latent_engine(family, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    assert answers(engine, PROMPTS, max_tokens=8) == [answer[:8] for answer in expected(family)]


@pytest.mark.parametrize("family", SOME)
def test_pages_are_found_again_and_preempted_like_others(family: str) -> None:
    engine = latent_engine(family)
    assert len(engine.pool.layout.groups) == 1
    right = expected(family)
    assert answers(engine, [PROMPTS[2]]) == [right[2]]
    before = engine.stats.cached_tokens
    assert answers(engine, [PROMPTS[2]]) == [right[2]]
    assert engine.stats.cached_tokens - before == 128
    small = latent_engine(family, max_num_seqs=3, kv_cache_memory=7 * engine.pool.layout.frame_bytes)
    assert answers(small, PROMPTS) == right
    assert small.stats.preemptions > 0


@pytest.mark.parametrize("family", SOME)
def test_guesses_that_fail_leave_no_trace(family: str) -> None:
    """Of every guess two tokens are right and two are not."""
    speculative = SpeculativeConfig(method="ngram", num_speculative_tokens=4, adaptive=False)
    engine = Engine(loaded_of(family), latent_engine(family).config, speculative=speculative)
    right = dict(zip(map(tuple, PROMPTS), expected(family), strict=True))

    def propose(candidates: Sequence[Candidate]) -> list[list[int]]:
        coming = [right[tuple(c.request.prompt)][c.request.num_output :][: c.count] for c in candidates]
        return [[*tokens[:2], *(token ^ 1 for token in tokens[2:])] for tokens in coming]

    engine.speculator._proposer.propose = propose
    assert answers(engine, PROMPTS) == expected(family)
    tried = engine.stats.speculation
    assert tried.draft_tokens > tried.accepted_tokens > 0.4 * tried.draft_tokens, tried


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_answers_that_do_not_depend_on_others_to_the_last_bit(dtype: str) -> None:
    check_bits("minicpm3", kv_cache_dtype=dtype)


def test_projections_that_are_not_packed_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not packed"):
        latent_engine("minicpm3", batch_invariant=True)
