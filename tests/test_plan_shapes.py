"""Plans of published models of mixed shapes, from a ``config.json`` alone, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbits.config import ModelGeometry, pages_of
from kvbits.models.facts import facts_of_model
from kvbits.planning.facts import known_facts
from kvbits.planning.request import Options, make_plan

GRANITE = {  # granite-4.0-h-small
    "model_type": "granitemoehybrid", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
    "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_expand": 2, "vocab_size": 100352, "max_position_embeddings": 131072, "num_local_experts": 4,
    "intermediate_size": 768, "shared_intermediate_size": 1536, "time_step_limit": [0.0, {"__float__": "Infinity"}],
}  # fmt: skip
FALCON = {  # Falcon-H1-34B: every layer is both
    "model_type": "falcon_h1", "hidden_size": 5120, "num_hidden_layers": 72, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": 128, "mamba_d_ssm": 4096, "mamba_n_heads": 32, "mamba_d_head": 128,
    "mamba_d_state": 256, "mamba_n_groups": 2, "mamba_d_conv": 4, "vocab_size": 1024, "intermediate_size": 1024,
    "max_position_embeddings": 262144,
}  # fmt: skip
LFM2 = {  # LFM2-1.2B: short convolutions only
    "model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "conv_L_cache": 3, "vocab_size": 65536, "max_position_embeddings": 128000,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
}  # fmt: skip
NEMOTRON = {  # Nemotron 3 Nano, 30B-A3B
    "model_type": "nemotron_h", "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 128, "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    "vocab_size": 1024, "max_position_embeddings": 262144, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "intermediate_size": 64,
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict, int, int, int]] = {
    # fields; layers with attention; bytes of a token's keys and values in 16 bit; bytes of a session's states
    "qwen3-next-80b": (
        {"model_type": "qwen3_next"},
        12,
        12 * 2 * 2 * 256 * 2,
        36 * (32 * 128 * 128 * 4 + 8192 * 4 * 2),
    ),
    "granite-4-h-small": (GRANITE, 4, 4 * 2 * 8 * 128 * 2, 36 * (128 * 64 * 128 * 4 + (8192 + 2 * 128) * 4 * 2)),
    "falcon-h1-34b": (FALCON, 72, 72 * 2 * 4 * 128 * 2, 72 * (32 * 128 * 256 * 4 + (4096 + 4 * 256) * 4 * 2)),
    "lfm2-1.2b": (LFM2, 6, 6 * 2 * 8 * 64 * 2, 10 * 2048 * 3 * 2),
    "nemotron-3-nano": (NEMOTRON, 6, 6 * 2 * 2 * 128 * 2, 23 * (64 * 64 * 128 * 4 + (4096 + 2 * 8 * 128) * 4 * 2)),
}


def session(geometry_of: str | ModelGeometry, context: int, facts: object, **options: object) -> tuple[int, int]:
    """Bytes of a session of ``context`` tokens in 16 bit, and of its states."""
    asked = Options(memory="400GiB", weights="0.001GB", contexts=(context,), dtypes=("bf16",), **options)
    made = make_plan(facts, asked).plan
    return made.schemes[0].contexts[0].session_bytes, made.state_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_hybrids_session_by_hand(name: str, tmp_path: Path) -> None:
    fields, layers, token_bytes, state_bytes = PUBLISHED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    facts = facts_of_model(str(file))
    assert facts.geometry.num_layers == layers
    assert facts.geometry.bytes_per_token_16bit() == token_bytes
    held, states = session(name, 32_000, facts)
    assert states == state_bytes
    # 500 full pages, and the open one
    assert held == 501 * 64 * token_bytes + state_bytes
    wide = sum(s.nbytes(2) for s in facts.geometry.states if s.kind == "recurrent")
    if wide:
        assert session(name, 32_000, facts, state_dtype="bfloat16") == (held - wide // 2, state_bytes - wide // 2)
        two = make_plan(facts, Options("400GiB", "0.001GB", (32_000,), ("bf16",), ranks=2)).plan
        assert two.state_bytes == state_bytes // 2


@pytest.mark.parametrize(
    ("name", "full", "windows", "window", "heads", "size"),
    [("gemma-3-27b", 10, 52, 1024, 16, 128), ("gpt-oss-120b", 18, 18, 128, 8, 64)],
)
def test_a_windowed_session_by_hand(name: str, full: int, windows: int, window: int, heads: int, size: int) -> None:
    facts = known_facts(name)
    assert facts is not None
    page = 64 * 2 * heads * size * 2
    held, states = session(name, 32_000, facts)
    assert states == 0
    # A window ends where the next token's does, inside a page; and the open page of every layer.
    least = full * 500 * page + windows * pages_of(window - 1) * page + (full + windows) * page
    most = full * 500 * page + windows * (pages_of(window) + 1) * page + (full + windows) * page
    # groups of layers are filled up to frames of one size
    assert least <= held <= 1.1 * most
    assert held < 0.55 * (full + windows) * 501 * page
