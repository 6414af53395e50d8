"""Recurrent states in 16 bits: what they take, what they lose, and who is told that there are none."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.hugging_face import hugging_face_model
from helpers.hybrids import PROMPTS, answers, check_bits, expected, hybrid_engine, loaded_of, own_logits, prompt
from helpers.serving import byte_model, engine_of, packed_byte_model
from helpers.tiny import HYBRIDS, save, tiny_config, tiny_model
from helpers.tiny_engine import one_thread
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from kvbits import LLM
from kvbits.codecs import parse_policy
from kvbits.codecs.states import StateLayout
from kvbits.engine.config import EngineConfig
from kvbits.engine.precheck import check_engine
from kvbits.errors import ConfigError
from kvbits.evaluation.compare import SideBySide, with_states
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models import geometry_of
from kvbits.planning.core import plan

__all__ = ["one_thread"]

RECURRENT = tuple(family for family in HYBRIDS if not family.startswith("lfm2"))
"""Those with more than short convolutions."""


@pytest.mark.parametrize("family", RECURRENT)
def test_states_in_16_bits_lose_little(family: str) -> None:
    """Tiny models only: every page in 16 bit, so that nothing but the states is rounded."""
    tokens = prompt(200, 3)
    right = own_logits(family, tokens).log_softmax(-1)
    losses = {}
    for dtype in ("auto", "bfloat16"):
        engine = hybrid_engine(family, state_dtype=dtype, max_num_batched_tokens=1)
        got = torch.cat([logits for _, logits in engine.teacher_forced(tokens, 0)]).log_softmax(-1)
        losses[dtype] = float((right.exp() * (right - got)).sum(-1).mean())
    print(f"{family}: {losses['auto']:.1e} nats as computed, {losses['bfloat16']:.1e} in bfloat16")
    assert losses["auto"] < losses["bfloat16"] < 2e-3


def by_hand(family: str, tokens: list[int], first: int, rounded: bool) -> Tensor:
    """transformers' own log-probabilities from ``first`` on: a prompt, then token by token, states rounded between."""
    model = hugging_face_model(family)
    cache, found = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for start, end in pairwise([0, *range(first, len(tokens) + 1)]):
            places = torch.arange(start, end).unsqueeze(0)
            out = model(torch.tensor([tokens[start:end]]), position_ids=places, past_key_values=cache)
            found.append(out.logits[0, -1:].double().log_softmax(-1))
            for layer in cache.layers if rounded else ():
                for state in getattr(layer, "recurrent_states", {}).values():
                    state.copy_(state.bfloat16())
    return torch.cat(found[1:])


@pytest.mark.parametrize("family", ["qwen3_next-dense", "bamba", "falcon_h1"])
def test_the_laboratory_measures_what_rounded_states_lose(family: str) -> None:
    tokens, first, loaded = prompt(150, 3), 70, loaded_of(family)
    policies = with_states(loaded, [loaded.policy("bf16"), loaded.policy("int4")], "bfloat16")
    found = SideBySide(loaded, policies, len(tokens), 512, ReferenceBackend, "bfloat16").run(tokens, first)
    right, own = (by_hand(family, tokens[:-1], first, rounded) for rounded in (False, True))
    kl = (right.exp() * (right - own)).sum(-1)
    measured = torch.cat([torch.from_numpy(part) for part in found["bf16, states in bfloat16"].kl])
    print(f"{family}: {float(kl.mean()):.2e} nats by hand, {float(measured.mean()):.2e} measured")
    assert measured.shape == kl.shape
    torch.testing.assert_close(measured, kl, rtol=0.05, atol=0.05 * float(kl.mean()))
    coded = torch.cat([torch.from_numpy(part) for part in found["int4, states in bfloat16"].kl])
    assert coded.mean() > measured.mean()


def test_slots_are_half_as_large() -> None:
    """Of the published Qwen3-Next: 32 heads of 128 by 128 in 16 bit, beside convolutions that stay as they are."""
    geometry = geometry_of(AutoConfig.for_model("qwen3_next"))
    sizes = {dtype: StateLayout.of(geometry.stored_in(dtype)).slot_bytes for dtype in ("auto", "float32", "bfloat16")}
    assert sizes["bfloat16"] == 36 * (32 * 128 * 128 * 2 + 8192 * 4 * 2)
    assert sizes["auto"] == sizes["float32"] == 36 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)


def test_an_engine_and_a_plan_count_them() -> None:
    loaded = packed_byte_model(family="bamba", fused=False)
    engine = engine_of(loaded, kv_cache_memory=1 << 20, max_num_seqs=8, state_dtype="bfloat16")
    states = engine.pool.states
    assert states.slot_bytes == 2 * (192 * 4 * 2 + 8 * 16 * 16 * 2)
    assert {str(states.state(0, shape).dtype) for shape in states.geometry.states} == {"torch.bfloat16"}
    assert "of states a sequence (in bfloat16), in" in engine.recurrent
    used = states.num_bytes + engine.pool.buffer.nbytes
    assert 0 <= (1 << 20) - used < engine.pool.layout.frame_bytes
    geometry = loaded.geometry.stored_in("bfloat16")
    made = plan(geometry, [parse_policy("int8", geometry.num_layers)], 1 << 20, [256], max_num_seqs=8)
    assert made.state_bytes == states.slot_bytes
    assert made.schemes[0].num_frames == engine.pool.num_frames


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_float32_is_what_these_layers_compute_in(family: str) -> None:
    assert answers(hybrid_engine(family, state_dtype="float32"), PROMPTS) == expected(family)


@pytest.mark.parametrize("family", ["qwen3_next-dense", "bamba"])
def test_answers_depend_on_positions_alone_in_16_bits_too(family: str) -> None:
    """Token by token every state is rounded once, wherever prompts are cut and whoever else runs."""
    check_bits(family, state_dtype="bfloat16")


def test_wrong_dtypes_and_models_without_states_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="state_dtype is 'int8'; choose from auto, float32, bfloat16"):
        EngineConfig(state_dtype="int8")
    with pytest.raises(ConfigError, match="state_dtype is 'bfloat16'; lfm2 has no recurrent states"):
        engine_of(loaded_of("lfm2"), state_dtype="bfloat16")
    with pytest.raises(ConfigError, match="has no recurrent states"):
        engine_of(byte_model(), state_dtype="float32")
    with pytest.raises(ConfigError, match="the name is state_dtype"):
        LLM("none", mamba_ssm_cache_dtype="float32")
    name = save(tiny_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match="has no recurrent states"):
        check_engine(name, EngineConfig(state_dtype="float32"))
    assert geometry_of(tiny_config("llama")).stored_in("auto").states == ()
