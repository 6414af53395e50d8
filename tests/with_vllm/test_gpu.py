"""The plug-in's part for GPUs without one: Triton's kernels in the interpreter, on the metadata that vLLM makes.

vLLM runs on the CPU, and all but the device is as on a GPU: builders, block tables, rings of open pages, the tables of
the kernels. Rows are compared with the slow reference, which knows no blocks; the model is in float32.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import VOCAB, save, tiny_model
from helpers.vllm_engine import Engine
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvbits.errors import UnsupportedError
from kvbits.vllm import register
from kvbits.vllm.backend import KvbitsBackend, StepBuilder
from kvbits.vllm.blocks import PageBackend
from kvbits.vllm.open_page import OpenTableBuilder

pytestmark = pytest.mark.vllm

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [("llama", "int4", {"speculative_config": NGRAM}), ("gemma2", "0:int8,1:int4,2:nf4/int8", {})],
)
def test_triton_attends_as_the_reference_does(
    engine: Engine, tmp_path: Path, family: str, policy: str, options: dict
) -> None:
    """Chunks, prefix hits, drafts, windows, soft caps and a policy by layer."""
    changes = {"tie_word_embeddings": family == "gemma2"}
    model = save(tiny_model(family, max_position_embeddings=512, **changes), tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in (5, 63, 140)]
    one = {"prompts": prompts, "params": {"max_tokens": 8, "temperature": 0, "ignore_eos": True}}
    found = engine(
        model, [one, one], policy, record={"triton": True}, environment={"TRITON_INTERPRET": "1"}, dtype="float32",
        max_model_len=256, kv_cache_memory_bytes=16 << 20, max_num_batched_tokens=100, **options,
    )  # fmt: skip
    (replayed,) = found.replayed
    assert replayed["rows"] > 3 * (5 + 63 + 140)
    print(f"{family}: {replayed['rows']} rows, at most {replayed['most']:.1e} apart")
    assert 0 < replayed["most"] < 2e-5
    assert found.tokens(0) == found.tokens(1)
    assert found.counter("prefix_cache_hits") == 128


class Gpu(CpuPlatform):
    """What vLLM asks of a platform, answered as on a GPU."""

    device_type = "cuda"

    @classmethod
    def is_cpu(cls) -> bool:
        return False


def test_a_gpu_gets_the_custom_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    assert AttentionBackendEnum.CUSTOM.get_class() is KvbitsBackend
    assert PageBackend.get_name() == "CPU_ATTN"
    monkeypatch.setattr("kvbits.vllm.blocks.current_platform", Gpu())
    assert KvbitsBackend.get_name() == "CUSTOM"


def test_names_that_gpus_serve_themselves_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 has ``int4_per_token_head`` on GPUs, where a policy is refused; a later one takes kvbits' own names."""
    own = Gpu()
    monkeypatch.setattr("vllm.platforms.current_platform", own)
    register()
    names = type(own).kvbits_names
    assert "int4_per_token_head" not in names
    asked = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"), additional_config={"kvbits": {"policy": "int4"}}
    )
    if names.carrier:
        assert names.carrier == "kvbits"
    else:
        with pytest.raises(UnsupportedError, match=r"0\.33 or later on a GPU"):
            own.check_and_update_config(asked)


def test_no_graph_holds_a_launch() -> None:
    for builder in (StepBuilder, OpenTableBuilder):
        assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
