"""LongRoPE models: the short factors up to their switch, the long ones for every token where more is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.driver import Driver
from helpers.hybrids import prompt
from helpers.tiny import save, tiny_config, tiny_model
from helpers.tiny_engine import one_thread
from helpers.zoo import LONGROPE, ZOO
from torch import Tensor

from kvbits import LLM
from kvbits.errors import ConfigError
from kvbits.kernels.cpu import CpuBackend
from kvbits.models import geometry_of, load_model
from kvbits.models.load import LoadedModel

__all__ = ["one_thread"]

SWITCH, LONGEST = 256, 512
ROPE = LONGROPE["rope_parameters"]


def model_with(factors: str | None = None) -> Any:
    """The tiny model, or one whose short and long factors are both those of this name."""
    rope = ROPE if factors is None else {**ROPE, "short_factor": ROPE[factors], "long_factor": ROPE[factors]}
    return tiny_model("phi3", **{**LONGROPE, "rope_parameters": rope})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(model_with(), tmp_path_factory.mktemp("longrope"))


@torch.inference_mode()
def own_logits(factors: str, tokens: list[int]) -> Tensor:
    return model_with(factors)(torch.tensor([tokens])).logits[0]


def logits(loaded: LoadedModel, tokens: list[int], dtype: str = "bf16") -> Tensor:
    """In parts, beside another sequence that is far shorter."""
    driver, parts = Driver(loaded, dtype, CpuBackend(), frames=128), []
    for start in range(0, len(tokens), 100):
        part = tokens[start : start + 100]
        parts.append(driver.step({1: [5], 0: part})[0])
    return torch.cat(parts)


def loss(right: Tensor, got: Tensor) -> float:
    right, got = right.log_softmax(-1), got.log_softmax(-1)
    return float((right.exp() * (right - got)).sum(-1).mean())


@pytest.mark.parametrize(
    ("asked", "context", "factors", "other"),
    [
        (None, SWITCH, "short_factor", "long_factor"),
        (SWITCH, SWITCH, "short_factor", "long_factor"),
        (SWITCH + 1, LONGEST, "long_factor", "short_factor"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_follow_the_longest_sequence_that_is_wanted(
    path: str, dtype: str, asked: int | None, context: int, factors: str, other: str
) -> None:
    loaded = load_model(path, dtype, max_model_len=asked)
    assert loaded.geometry.max_position == context
    assert (loaded.fused is not None) == (dtype == "bfloat16")
    for tokens in (prompt(90, 1), prompt(context - 20, 2)):
        right = own_logits(factors, tokens)
        most = 1e-4 if dtype == "float32" else 5e-3
        assert loss(right, logits(loaded, tokens)) < most
        assert loss(right, own_logits(other, tokens)) > 10 * most, "the factors make no difference"
        if dtype == "float32":
            assert loss(right, logits(loaded, tokens, "int8")) < 1e-3


def test_the_library_takes_what_its_context_asks_for(path: str) -> None:
    with LLM(path, kv_cache_dtype="int8", kv_cache_memory="8MiB", progress=False) as llm:
        assert llm.engine.max_model_len == SWITCH
    with LLM(path, kv_cache_dtype="int8", kv_cache_memory="8MiB", max_model_len=400, progress=False) as llm:
        assert llm.engine.max_model_len == 400
    with pytest.raises(ConfigError, match=r"the context of .* is 256 tokens"):
        LLM(load_model(path), kv_cache_dtype="int8", kv_cache_memory="8MiB", max_model_len=400, progress=False)
    with pytest.raises(ConfigError, match=r"is 512 tokens|the 512 tokens"):
        LLM(path, kv_cache_dtype="int8", kv_cache_memory="8MiB", max_model_len=513, progress=False)


def test_code_that_never_takes_the_long_factors_keeps_the_context_of_the_short_ones(tmp_path: Path) -> None:
    """transformers' Phi-MoE computes its short ones at every position, and asks for positions' values meanwhile."""
    config = tiny_config("phimoe-longrope", **ZOO["phimoe-longrope"])
    assert geometry_of(config, max_model_len=SWITCH + 1).max_position == SWITCH
    name = save(tiny_model("phimoe-longrope", **ZOO["phimoe-longrope"]), tmp_path)
    with pytest.raises(ConfigError, match=r"max_model_len is 300; the context of .* is 256 tokens"):
        LLM(name, kv_cache_dtype="int8", kv_cache_memory="8MiB", max_model_len=300, progress=False)


def test_a_plan_is_of_the_whole_context(tmp_path: Path) -> None:
    from kvbits.models.facts import facts_of_model

    config = tiny_config("phi3", **LONGROPE)
    config.save_pretrained(tmp_path)
    assert facts_of_model(str(tmp_path / "config.json")).geometry.max_position == LONGEST
    assert geometry_of(config).max_position == SWITCH
