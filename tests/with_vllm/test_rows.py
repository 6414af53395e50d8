"""Every row of attention inside vLLM against the same rows in a pool of kvbits' own, to the last bit (recorder.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import VOCAB, save, tiny_model
from helpers.vllm_engine import Engine, Run

from kvbits.codecs import LayerRounding, Policy, Rounding, parse_policy
from kvbits.codecs.policy_file import save_policy
from kvbits.models import load_model

pytestmark = pytest.mark.vllm

LENGTHS = (5, 63, 64, 65, 130, 200, 321, 500)
NGRAM = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def run(engine: Engine, directory: Path, family: str, policy: str, n: int = 1, **options: Any) -> Run:
    """The same prompts twice, the second time with what the first left in the prefix cache."""
    return run_model(engine, saved(directory, family), policy, n, **options)


def saved(directory: Path, family: str) -> str:
    """vLLM knows Gemma with tied embeddings alone, and gpt-oss with YaRN."""
    changes: dict[str, Any] = {"tie_word_embeddings": family.startswith("gemma")}
    if family == "gpt_oss":
        changes["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        }  # fmt: skip
    return save(tiny_model(family, max_position_embeddings=2048, **changes), directory)


def run_model(engine: Engine, model: str, policy: str, n: int, **options: Any) -> Run:
    one = {"prompts": prompts(), "params": {"max_tokens": 80, "temperature": 0 if n == 1 else 1, "seed": 1, "n": n,
                                            "ignore_eos": True}}  # fmt: skip
    found = engine(model, [one, one], policy, record={}, max_model_len=1024, kv_cache_memory_bytes=16 << 20, **options)
    (replayed,) = found.replayed
    assert replayed["rows"] > len(LENGTHS) * 80
    assert replayed["differing"] == 0, replayed["most"]
    assert found.tokens(0) == found.tokens(1)
    return found


def test_chunks_and_prefix_hits(engine: Engine, tmp_path: Path) -> None:
    found = run(engine, tmp_path, "llama", "int4", dtype="float32", max_num_batched_tokens=256)
    assert found.counter("prefix_cache_hits") == 1152
    assert max(count for _, _, count in found.replayed[0]["steps"]) > 200


def test_preemption_drafts_and_small_chunks(engine: Engine, tmp_path: Path) -> None:
    found = run(
        engine, tmp_path, "llama", "int4", dtype="float32", max_num_batched_tokens=100, num_gpu_blocks_override=30,
        speculative_config=NGRAM,
    )  # fmt: skip
    assert found.counter("num_preemptions") > 0
    assert found.counter("spec_decode_num_accepted_tokens") > 0
    assert found.counter("spec_decode_num_draft_tokens") > found.counter("spec_decode_num_accepted_tokens")


@pytest.mark.parametrize(
    ("family", "policy"),
    [("gemma2", "0:int8,1:int4,2:int8/int4"), ("gemma3_text", "int8"), ("gpt_oss", "int4")],
)
def test_windows_soft_caps_and_sinks(engine: Engine, tmp_path: Path, family: str, policy: str) -> None:
    """Gemma 2 has windows and soft caps and a policy by layer here, gpt-oss windows and sinks; drafts on top."""
    run(engine, tmp_path, family, policy, dtype="bfloat16", max_num_batched_tokens=150, speculative_config=NGRAM)


def test_several_answers_to_a_prompt(engine: Engine, tmp_path: Path) -> None:
    found = run(engine, tmp_path, "llama", "int8", n=3, dtype="float32")
    assert [len(answers) for answers in found.tokens()] == [3] * len(LENGTHS)


def test_a_calibrated_policy(engine: Engine, tmp_path: Path) -> None:
    """Rounding by head and layer, read from the artifact; another model's is refused."""
    model = saved(tmp_path / "model", "llama")
    loaded = load_model(model, dtype="float32")
    generator = torch.Generator().manual_seed(5)
    shapes = [(g.num_kv_heads, g.key_dim, g.key_dim) for g in loaded.geometry.layers]
    keys = [torch.randn(shape, generator=generator).triu(1) * 0.05 for shape in shapes]
    rounding = tuple(LayerRounding(Rounding(feedback=table), Rounding()) for table in keys)
    plain = parse_policy("0:int8,1-2:int4", 3)
    policy = Policy("ours", plain.layers, rounding=rounding)
    save_policy(tmp_path / "policy", policy, loaded.geometry, loaded.fingerprint, {})
    found = run_model(engine, model, f"policy:{tmp_path / 'policy'}", 1, dtype="float32")
    assert found.tokens() != run_model(engine, model, plain.name, 1, dtype="float32").tokens()
    save_policy(tmp_path / "other", policy, loaded.geometry, "0" * 16, {})
    with pytest.raises(AssertionError, match="was calibrated for"):
        run_model(engine, model, f"policy:{tmp_path / 'other'}", 1, dtype="float32")
