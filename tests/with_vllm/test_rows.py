"""Every row of attention inside vLLM against the same rows in a pool of kvbits' own, to the last bit (recorder.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import VOCAB, save, tiny_model
from helpers.vllm_engine import Engine, Run

pytestmark = pytest.mark.vllm

LENGTHS = (5, 63, 64, 65, 130, 200, 321, 500)
NGRAM = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def run(engine: Engine, directory: Path, family: str, policy: str, n: int = 1, **options: Any) -> Run:
    """The same prompts twice, the second time with what the first left in the prefix cache."""
    tied = family.startswith("gemma")  # vLLM knows them no other way
    model = save(tiny_model(family, max_position_embeddings=2048, tie_word_embeddings=tied), directory)
    one = {"prompts": prompts(), "params": {"max_tokens": 80, "temperature": 0 if n == 1 else 1, "seed": 1, "n": n,
                                            "ignore_eos": True}}  # fmt: skip
    found = engine(
        model, [one, one], policy, record=None, max_model_len=1024, kv_cache_memory_bytes=16 << 20, **options
    )
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
