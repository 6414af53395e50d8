"""Sinks and calibrated policies through the whole engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.backends import BACKENDS
from helpers.tiny import tiny_model, tiny_tokenizer

from kvbits import LLM, SamplingParams
from kvbits.calibration.fit import ordered_feedback
from kvbits.codecs import LayerRounding, Policy, parse_policy
from kvbits.codecs.policy_file import save_policy
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.models.load import wrap

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return wrap(tiny_model("llama", head_dim=32), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def dtype(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy with a sink and feedback under a made-up metric."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(2, 40, 32, generator=g)
    rounding = LayerRounding(ordered_feedback(base.transpose(1, 2) @ base))
    plain = parse_policy("int6+sink:int8", 3)
    directory = tmp_path_factory.mktemp("policy")
    save_policy(
        directory, Policy("", plain.layers, plain.sink, (rounding,) * 3), loaded.geometry, loaded.fingerprint, {}
    )
    return f"policy:{directory}"


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("name", BACKENDS)
def test_prefix_hits_and_chunks_do_not_matter(loaded: LoadedModel, dtype: str, name: str) -> None:
    backend = BACKENDS[name]()
    prompts = [[4 + (i * i + 3 * j) % 93 for i in range(150 + j)] for j in range(2)]

    def make(**options: object) -> LLM:
        llm = LLM(loaded, kv_cache_dtype=dtype, kv_cache_memory="4MiB", backend=backend, progress=False, **options)
        llm.engine.pool.buffer.fill_(0xFF)  # a byte that no one wrote must not be read
        return llm

    expected = tokens(make(enable_prefix_caching=False), prompts)
    llm = make()
    assert tokens(llm, prompts) == expected
    assert tokens(llm, prompts) == expected
    assert llm.engine.stats.cached_tokens == 2 * 128
    assert tokens(make(max_num_batched_tokens=64), prompts) == expected
    llm.engine.pages.check()


def test_the_policy_decides_what_a_page_holds(loaded: LoadedModel, dtype: str) -> None:
    """Other rounding, other bytes, so another cache key: a page of one policy is never taken for another's."""
    calibrated = LLM(loaded, kv_cache_dtype=dtype, kv_cache_memory="4MiB", progress=False).engine
    plain = LLM(loaded, kv_cache_dtype="int6+sink:int8", kv_cache_memory="4MiB", progress=False).engine
    assert calibrated.pool.policy.layers == plain.pool.policy.layers
    assert calibrated.pool.policy.name != plain.pool.policy.name
    assert calibrated.pool.layers[0].rounding is not None
    assert calibrated.pool.layers[0].first_page == plain.pool.layers[0].first_page


def test_a_missing_policy_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the policy file"):
        LLM(loaded, kv_cache_dtype=f"policy:{tmp_path}", kv_cache_memory="4MiB", progress=False)
