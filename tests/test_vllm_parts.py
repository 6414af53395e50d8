"""The plug-in for vLLM without vLLM: options, refusals, and its blocks and steps through the kernels.

tests/with_vllm runs the same inside vLLM ("make test-vllm").
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.vllm_memory import BLOCKS, LAYERS, VllmMemory
from torch import Tensor

from kvbits.codecs import SCHEMES, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.cpu import CpuBackend
from kvbits.pool import PagedPool
from kvbits.vllm import register
from kvbits.vllm.checks import check_engine
from kvbits.vllm.options import Names, policy_asked
from kvbits.vllm.step import Step
from kvbits.vllm.views import view_of

NAMES = Names({"kvbits_int4": "int4", "kvbits_int8": "int8"}, carrier="kvbits")
OLD_NAMES = Names({"int8_per_token_head": "int8"}, carrier="int8_per_token_head")


class TestOptions:
    def test_a_name_is_a_policy(self) -> None:
        assert policy_asked("kvbits_int4", {}, NAMES) == "int4"
        assert policy_asked("auto", {}, NAMES) is None
        assert policy_asked("fp8", None, NAMES) is None
        assert policy_asked("int8_per_token_head", {}, OLD_NAMES) == "int8"

    @pytest.mark.parametrize("names", [NAMES, OLD_NAMES])
    def test_any_policy_comes_by_additional_config(self, names: Names) -> None:
        asked = {"kvbits": {"policy": "0-1:int8,2:int4"}, "other": 1}
        assert policy_asked("auto", asked, names) == "0-1:int8,2:int4"
        assert policy_asked(names.carrier, asked, names) == "0-1:int8,2:int4"  # vLLM checks its options again

    @pytest.mark.parametrize(
        ("dtype", "extra", "says"),
        [
            ("kvbits_int4", {"kvbits": {"policy": "int8"}}, "contradict"),
            ("fp8", {"kvbits": {"policy": "int8"}}, "contradict.*asks for fp8, write --kv-cache-dtype kvbits"),
            ("kvbits", {}, "takes its policy from"),
            ("auto", {"kvbits": "int8"}, "'int8'"),
            ("auto", {"kvbits": {"polcy": "int8"}}, "'polcy'"),
            ("auto", {"kvbits": {"policy": ""}}, "choose from"),
            ("auto", {"kvbits": {"policy": 4}}, "choose from"),
        ],
    )
    def test_what_contradicts_itself_is_named(self, dtype: str, extra: dict, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            policy_asked(dtype, extra, NAMES)


def test_an_older_vllm_runs_as_without_kvbits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM calls the plug-in at every start, whether its cache is asked for or not."""
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = own = SimpleNamespace(device_type="cpu", is_cpu=lambda: True)  # type: ignore[attr-defined]
    for name, module in {"vllm": ModuleType("vllm"), "vllm.platforms": platforms, "vllm.v1": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    register()
    assert type(own) is SimpleNamespace
    assert "needs vLLM 0.32 or later" in caplog.text


def engine(**changes: object) -> SimpleNamespace:
    """As much of a ``VllmConfig`` as is looked at."""
    model = SimpleNamespace(
        model="m", dtype=torch.bfloat16, use_mla=False, is_hybrid=False, is_encoder_decoder=False, max_model_len=512,
        is_attention_free=False, uses_alibi=False, runner_type="generate", get_head_size=lambda: 64,
        get_num_attention_heads=lambda _: 8, get_num_kv_heads=lambda _: 2, get_total_num_hidden_layers=lambda: 3,
        get_vocab_size=lambda: 99,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(
            user_specified_block_size=False, block_size=16, prefix_match_unit=None, kv_cache_dtype_skip_layers=[],
            kv_offloading_size=None,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, pipeline_parallel_size=1,
            use_ubatching=False,
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=None),
        speculative_config=None, kv_transfer_config=None, use_v2_model_runner=False,
    )  # fmt: skip
    for path, value in changes.items():
        *owner, name = path.split("__")
        target = config
        for part in owner:
            target = getattr(target, part)
        setattr(target, name, value)
    return config


class TestRefusals:
    def test_what_works_is_not_refused(self) -> None:
        check_engine(engine(), "0-1:int8,2:int4")
        check_engine(engine(speculative_config=SimpleNamespace(method="ngram", num_speculative_tokens=63)), "int4")
        check_engine(engine(cache_config__user_specified_block_size=True, cache_config__block_size=64), "int4")

    @pytest.mark.parametrize(
        ("changes", "policy", "says"),
        [
            ({}, "int4+sink:int8", "first page"),
            ({"model_config__get_head_size": lambda: 40}, "int4", "layer 0 .*head size 40"),
            ({"model_config__dtype": torch.float16}, "int4", "float16"),
            ({"model_config__use_mla": True}, "int4", "MLA"),
            ({"model_config__is_hybrid": True}, "int4", "recurrent"),
            ({"model_config__is_attention_free": True, "model_config__get_head_size": lambda: 0}, "int4", "recurrent"),
            ({"model_config__uses_alibi": True}, "int4", "ALiBi"),
            ({"model_config__is_encoder_decoder": True}, "int4", "encoder"),
            ({"model_config__runner_type": "pooling"}, "int4", "pooling"),
            ({"cache_config__user_specified_block_size": True}, "int4", "--block-size 16"),
            ({"cache_config__prefix_match_unit": 32}, "int4", "--prefix-match-unit 32"),
            ({"cache_config__kv_cache_dtype_skip_layers": ["0"]}, "int4", "skip-layers"),
            ({"cache_config__kv_offloading_size": 1.0}, "int4", "offloading"),
            ({"kv_transfer_config": object()}, "int4", "connector"),
            ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "int4", "hybrid"),
            ({"parallel_config__pipeline_parallel_size": 2}, "int4", "--pipeline-parallel-size 2"),
            ({"parallel_config__use_ubatching": True}, "int4", "--enable-dbo"),
            ({"use_v2_model_runner": True}, "int4", "VLLM_USE_V2_MODEL_RUNNER"),
            ({"speculative_config": SimpleNamespace(method="eagle", num_speculative_tokens=2)}, "int4", "'eagle'"),
            ({"speculative_config": SimpleNamespace(method="ngram", num_speculative_tokens=64)}, "int4", "64 drafts"),
        ],
    )
    def test_what_does_not_is_named(self, changes: dict, policy: str, says: str) -> None:
        with pytest.raises(UnsupportedError, match=says):
            check_engine(engine(**changes), policy)

    def test_a_wrong_policy_is_named(self) -> None:
        with pytest.raises(ConfigError, match="layers are 0 to 2"):
            check_engine(engine(), "0-3:int4")


class OpenBlocks:
    """Blocks of open pages: for each of two parities, each of two requests, each layer, one of its own."""

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def open_blocks(self, requests: np.ndarray) -> np.ndarray:
        return self.blocks[:, requests]


@pytest.mark.parametrize("dtype", ["int4", "0:int8,1:int4/int8", "nf3"])
@pytest.mark.parametrize("index", range(len(LAYERS)))
@pytest.mark.parametrize("drafts", [0, 7])
def test_steps_in_vllms_blocks_give_what_one_step_in_a_pool_gives(dtype: str, index: int, drafts: int) -> None:
    """Two requests in chunks of any size, or of few tokens of which the last were guessed wrong and come again."""
    layer, lengths = LAYERS[index], (330, 210)
    generator = torch.Generator().manual_seed(index)
    rows = [_rows(layer, n + drafts, generator) for n in lengths]
    sinks = torch.randn(layer.num_heads, generator=generator) if layer.sinks else None
    backend, memory = CpuBackend(), VllmMemory(dtype, 2 if drafts else 1)
    view = view_of(memory.layer(index), index, layer, memory)
    order = torch.randperm(BLOCKS, generator=generator).numpy().astype(np.int32)
    table = torch.from_numpy(order[:14].reshape(2, 7))
    tables = OpenBlocks(order[14 : 14 + 4 * memory.parities].reshape(memory.parities, 2, 2))
    found: list[list[Tensor]] = [[], []]
    done = [0, 0]
    numbers = np.random.default_rng(drafts)
    while done != list(lengths):
        kept = [min(int(numbers.integers(0, 90)), n - d) for n, d in zip(lengths, done, strict=True)]
        kept = [min(k, int(numbers.integers(1, 2 + drafts))) if drafts and numbers.random() < 0.9 else k for k in kept]
        counts = [1 + drafts if 0 < k <= 1 + drafts else k for k in kept]
        if not any(counts):
            continue
        ends = torch.tensor([d + c for d, c in zip(done, counts, strict=True)], dtype=torch.int32)
        start = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        batch = Step.of(2, start, ends, table).batch(tables)
        parts = [[t[d : d + c].clone() for t in r] for r, d, c in zip(rows, done, counts, strict=True)]
        for part, k in zip(parts, kept, strict=True):
            for t in part:
                t[k:] *= -1
        query, key, value = (torch.cat(t) for t in zip(*parts, strict=True))
        out = torch.empty_like(query)
        backend.forward(view, batch, query, key, value, sinks, out)
        for request, part in enumerate(out.split(counts)):
            found[request].append(part[: kept[request]])
            done[request] += kept[request]
    for length, whole, parts in zip(lengths, rows, found, strict=True):
        assert torch.equal(torch.cat(parts), _alone(dtype, index, [t[:length] for t in whole], sinks))


def _rows(layer: LayerGeometry, length: int, generator: torch.Generator) -> list[Tensor]:
    shapes = (
        (layer.num_heads, layer.key_dim),
        (layer.num_kv_heads, layer.key_dim),
        (layer.num_kv_heads, layer.value_dim),
    )
    return [torch.randn(length, *shape, generator=generator).bfloat16() for shape in shapes]


def _alone(dtype: str, index: int, rows: list[Tensor], sinks: Tensor | None) -> Tensor:
    geometry = ModelGeometry("two layers", LAYERS, 1024, 1)
    pool = PagedPool(geometry, parse_policy(dtype, len(LAYERS)), 1 << 22, free_windows=False)
    full, frames = len(rows[0]) // PAGE_TOKENS, pool.layout.open.frames
    own = list(range(full, full + frames))
    batch = BatchLayout.of([SequencePages(0, len(rows[0]), list(range(full)), own, own)])
    return CpuBackend().forward(pool.layers[index], batch, *rows, sinks)


def test_every_page_is_a_whole_number_of_bytes_a_token() -> None:
    """vLLM counts in bytes a token and head."""
    for scheme in SCHEMES.values():
        for dim in range(16, 272, 16):
            layer = LayerGeometry(1, 1, dim, dim, 1.0)
            if scheme.supports(layer) is None:
                assert scheme.head_bytes(layer) % PAGE_TOKENS == 0
