"""The planner against the pool's own accounting, the page manager's behaviour and a sum by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.codecs import SCHEMES, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError, OutOfPages
from kvbits.pages import PageManager
from kvbits.planning import SchemePlan, plan
from kvbits.pool import PagedPool

GIB = 1 << 30


def model(num_layers: int, kv_heads: int, key_dim: int, value_dim: int, context: int = 1 << 17) -> ModelGeometry:
    layer = LayerGeometry(4 * kv_heads, kv_heads, key_dim, value_dim, key_dim**-0.5)
    return ModelGeometry("a model", (layer,) * num_layers, context, 1000)


SMALL = model(30, 3, 64, 64)
LLAMA_8B = model(32, 8, 128, 128)


def one(geometry: ModelGeometry, dtype: str, memory: int, *contexts: int) -> SchemePlan:
    (scheme,) = plan(geometry, [parse_policy(dtype, geometry.num_layers)], memory, contexts).schemes
    return scheme


@given(
    dtype=st.sampled_from([*SCHEMES, "int8,int4", "int4,bf16"]),
    geometry=st.builds(
        model, st.integers(1, 40), st.integers(1, 8), st.sampled_from([64, 128, 256]), st.sampled_from([64, 128])
    ),
    pages=st.integers(12, 400),
    context=st.integers(1, 40_000),
)
@settings(max_examples=150, deadline=None)
def test_plan_is_what_the_pool_says(dtype: str, geometry: ModelGeometry, pages: int, context: int) -> None:
    memory = pages * 64 * geometry.bytes_per_token_16bit() + 12345
    policy = parse_policy(dtype, geometry.num_layers)
    scheme = one(geometry, dtype, memory, context)
    pool = PagedPool(geometry, policy, memory)
    (at,) = scheme.contexts
    assert at.sessions == pool.sessions_capacity(context)
    assert scheme.num_frames == pool.num_frames
    assert scheme.bits_per_element == pool.bits_per_element()
    assert scheme.kv_bytes_per_token == pool.bytes_per_token()
    assert at.effective_bits_per_element == pool.effective_bits_per_element(context)
    if scheme.longest_context < geometry.max_position:
        assert pool.sessions_capacity(scheme.longest_context) == 1
        assert pool.sessions_capacity(scheme.longest_context + 1) == 0
        assert scheme.limited_by == "memory"


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("context", [63, 64, 1000, 4096])
def test_plan_is_what_the_page_manager_admits(dtype: str, context: int) -> None:
    memory = 40_000_000
    scheme = one(SMALL, dtype, memory, context)
    pool = PagedPool(SMALL, parse_policy(dtype, 30), memory)
    pages = PageManager(pool.num_frames, pool.layout.open.frames, pool.layout.sealed.frames)
    admitted = 0
    try:
        while True:
            pages.open(admitted, tokens := [admitted] * context)
            pages.reserve(admitted, context)
            pages.commit(admitted, tokens)
            admitted += 1
    except OutOfPages:
        pass
    assert scheme.contexts[0].sessions == admitted


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_longest_context_really_fits_alone(dtype: str) -> None:
    scheme = one(SMALL, dtype, 40_000_000)
    pool = PagedPool(SMALL, parse_policy(dtype, 30), 40_000_000)
    pages = PageManager(pool.num_frames, pool.layout.open.frames)
    pages.open(0, [])
    pages.reserve(0, scheme.longest_context)
    pages.commit(0, [1] * scheme.longest_context)
    with pytest.raises(OutOfPages):
        pages.reserve(0, 1)


def test_sum_by_hand() -> None:
    """32 layers x 8 KV heads x (128 + 128) elements, 2 bytes each: 131,072 bytes a token; 64 tokens are 8 MiB."""
    scheme = one(LLAMA_8B, "bf16", 80 * GIB, 131_072)
    assert scheme.kv_bytes_per_token == 131_072
    assert scheme.frame_bytes == scheme.open_page_bytes == 8 << 20
    assert scheme.contexts[0].sessions == 80 * 128 // 2049
    assert scheme.contexts[0].gain_over_16bit == 1
    # int8: one byte an element; keys two fp16 for each of 128 channels in 64 tokens, values one a token.
    scheme = one(LLAMA_8B, "int8", 80 * GIB, 131_072)
    assert scheme.bits_per_element == 8 * (136 + 130) / 256
    frame = 64 * 32 * 8 * (136 + 130)
    assert (scheme.frame_bytes, scheme.open_page_bytes) == (frame, 2 * frame)
    assert scheme.contexts[0].session_bytes == (2048 + 2) * frame
    assert scheme.contexts[0].sessions == 80 * GIB // ((2048 + 2) * frame)
    assert scheme.contexts[0].gain_over_16bit == pytest.approx(2049 * (8 << 20) / (2050 * frame))


def test_weights_workspace_and_the_limit_on_sequences() -> None:
    policies = [parse_policy(dtype, 30) for dtype in ("bf16", "int4")]
    result = plan(SMALL, policies, 3 * GIB, [4096, 4096, 512], GIB, GIB // 2, max_num_seqs=20)
    assert result.cache_bytes == 3 * GIB - GIB - GIB // 2
    assert [s.dtype for s in result.schemes] == ["bf16", "int4"]
    alone = plan(SMALL, policies, result.cache_bytes, [4096, 512])
    for scheme, same in zip(result.schemes, alone.schemes, strict=True):
        assert [c.context for c in scheme.contexts] == [4096, 512]
        for at, free in zip(scheme.contexts, same.contexts, strict=True):
            assert at.sessions == free.sessions == free.running
            assert at.running == min(20, at.sessions)
            assert at.fills_first == ("max_num_seqs" if at.sessions > 20 else "memory")
    assert {at.fills_first for s in result.schemes for at in s.contexts} == {"memory", "max_num_seqs"}


def test_model_limits_the_longest_context() -> None:
    scheme = one(model(30, 3, 64, 64, context=2048), "int4", GIB, 2048)
    assert (scheme.longest_context, scheme.limited_by) == (2048, "model")


def test_too_little_memory_for_one_session_is_zero_sessions() -> None:
    scheme = one(SMALL, "int4", 1000, 64)
    assert (scheme.contexts[0].sessions, scheme.longest_context, scheme.limited_by) == (0, 0, "memory")


def test_json_has_plain_types_only() -> None:
    result = plan(SMALL, [parse_policy("int8", 30)], GIB, [64, 4096])
    read = json.loads(json.dumps(result.as_json()))
    assert read == result.as_json()
    first, second = read["schemes"][0]["contexts"]
    assert (first["context"], second["context"]) == (64, 4096)
    assert second["sessions"] == result.schemes[0].contexts[1].sessions
    for name in ("dtype", "bits_per_element", "kv_bytes_per_token", "sessions", "longest_context", "gain_over_16bit"):
        assert isinstance(read["schemes"][0][name], str if name == "dtype" else (int, float)), name
    assert read["schemes"][0]["sessions"] == first["sessions"]


def test_impossible_plans_name_the_numbers() -> None:
    policies = [parse_policy("int8", 30)]
    with pytest.raises(
        ConfigError, match="100 bytes leave nothing for the KV cache: weights take 70 bytes, workspace 30 bytes"
    ):
        plan(SMALL, policies, 100, [64], 70, 30)
    for context in (0, -1, 131_073):
        with pytest.raises(
            ConfigError, match=f"context of {context} tokens cannot be planned: a model has 1 to 131072"
        ):
            plan(SMALL, policies, GIB, [context])
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        plan(SMALL, policies, GIB, [64], max_num_seqs=0)
