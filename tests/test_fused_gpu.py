"""Layers fused for GPUs against transformers' own code, on the CPU: the kernels' place is taken by torch.

The kernels themselves run in :mod:`test_elementwise`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.driver import Driver
from helpers.plain_rows import PlainRows
from helpers.recorded import Rerun, Watched, check_reads, recording
from helpers.tiny import VOCAB, tiny_model
from helpers.tiny_engine import PROMPTS, make, one_thread, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvbits.engine.params import SamplingParams
from kvbits.kernels import Backend
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models.fused_gpu import FusedGpuModel, fuse_on_gpu
from kvbits.models.load import LoadedModel, wrap

pytest.importorskip("triton", reason="Triton exists for Linux only")

__all__ = ["one_thread"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3-window": {},
    "mistral": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "phi3 turned in part": {
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "olmo2": {},
}
TEXT = torch.randint(4, VOCAB, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Tiny, with biases and norms that all differ."""
    changes, name = FAMILIES.get(family, {}), family.split()[0]
    if name == "gemma":
        changes, name = {"model_type": "gemma"}, "llama"
    model = tiny_model(name, **changes)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def fused(model: Any) -> tuple[LoadedModel, PlainRows]:
    """The model with fused layers, and what they launched since they were tried."""
    launch = PlainRows()
    loaded = wrap(model, None, "tiny")
    assert loaded.fused is None
    found = fuse_on_gpu(model, loaded.geometry, CpuBackend(), launch)
    assert isinstance(found, FusedGpuModel), found
    launch.launches.clear()
    return replace(loaded, fused=found), launch


class Unrounded(ReferenceBackend):
    """Attention to keys and values as they came: a cache's 16 bit turn a last bit into 0.4 %."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def forward(self, view: Any, batch: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Any) -> Tensor:
        parts, layer = [], view.geometry
        for s, (start, count, row) in enumerate(zip(batch.starts, batch.counts, batch.rows, strict=False)):
            own, name = slice(row, row + count), (view.index, int(batch.tail[s, 0]))
            new = key[own].clone(), value[own].clone()
            keys, values = (torch.cat(x) for x in zip(self._kept[name], new, strict=True)) if start else new
            self._kept[name] = keys, values
            distance = torch.arange(start, start + count)[:, None] - torch.arange(start + count)
            seen = (distance >= 0) & (distance < (layer.window or 1 << 20))
            q, k, v = query[own], *(x.repeat_interleave(layer.group_size, 1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
            if layer.softcap:
                scores = layer.softcap * (scores / layer.softcap).tanh()
            parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
        return torch.cat(parts)


def steps(loaded: LoadedModel, backend: Backend | None = None) -> Tensor:
    """Logits of prompts of two sequences, of decode steps of both, and of a third sequence meanwhile."""
    driver, parts = Driver(loaded, "bf16", backend or CpuBackend()), []
    for step in (
        {0: TEXT[:70], 1: TEXT[:3]},
        {0: TEXT[70:71], 1: TEXT[3:4]},
        {1: TEXT[4:5], 2: TEXT[:60], 0: TEXT[71:72]},
        {2: TEXT[60:110], 1: TEXT[5:6]},
    ):
        parts += driver.step(step).values()
    return torch.cat(parts)


def errors(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str) -> None:
    """In float32 up to its rounding."""
    loaded, launch = fused(model_of(family))
    found = errors(steps(loaded, Unrounded()), steps(replace(loaded, fused=None), Unrounded()))
    assert set(launch.launches) == {"add_norm_rows", "turn_heads", "gate_rows"}
    assert found.max() < 1e-5, found.max()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers(family: str) -> None:
    expected = steps(wrap(model_of(family, torch.bfloat16).float(), None, "tiny"))
    loaded, _ = fused(model_of(family, torch.bfloat16))
    found, own = (errors(steps(model), expected) for model in (loaded, replace(loaded, fused=None)))
    assert found.median() < 1.1 * own.median(), (found.median(), own.median())


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "olmo2"])
def test_greedy_text_is_transformers(family: str) -> None:
    loaded, launch = fused(model_of(family))
    params = [SamplingParams(temperature=0.0, max_tokens=5 + 5 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    got = tokens(make(loaded, CpuBackend()), PROMPTS, params)
    assert launch.launches
    assert got == tokens(make(replace(loaded, fused=None), CpuBackend()), PROMPTS, params)


def test_recorded_steps_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = fused(model_of("qwen3-window"))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    plain = tokens(make(loaded, ReferenceBackend()), PROMPTS[:4], params)
    recording(monkeypatch, Rerun)
    assert tokens(make(loaded, ReferenceBackend()), PROMPTS[:4], params) == plain
    assert Rerun.replays > 8


def test_what_a_recording_reads_lives_as_long_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = fused(model_of("gemma3_text"))
    made = recording(monkeypatch, Watched)
    make(loaded, ReferenceBackend(), "int4", max_num_seqs=2).engine.warm_up(lambda line: None)
    check_reads(made[-1], [1, 1, 2, 2])


class Operators(TorchDispatchMode):
    """Counts what a device would launch: no views, nothing that only reserves memory, nothing inside the kernels."""

    def __init__(self, launch: PlainRows) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._launch, self._inside = launch, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or self._launch.running or "empty" in func.__name__):
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Nothing(ReferenceBackend):
    """Attention that computes nothing."""

    def forward(self, view: Any, batch: Any, query: Tensor, *sides: Any) -> Tensor:
        return query.new_empty(query.shape)


def launched(family: str, layers: int) -> Counter[str]:
    """By a step of three sequences."""
    model = model_of(family, torch.bfloat16)
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    loaded, launch = fused(model)
    driver = Driver(loaded, "bf16", Nothing())
    launch.launches.clear()
    with Operators(launch) as operators:
        driver.step({0: [5], 1: [6], 2: [7]})
    return operators.counts + Counter(launch.launches)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-window", "gemma3_text", "phi3", "olmo2"])
def test_a_layer_is_four_products_and_four_kernels(family: str) -> None:
    counts = launched(family, 3)
    counts.subtract(launched(family, 2))
    assert +counts == {"linear": 4, "add_norm_rows": 2, "turn_heads": 1, "gate_rows": 1}


@pytest.mark.parametrize("family", ["llama with biases", "phi3"])
def test_no_weight_is_held_twice(family: str) -> None:
    model = model_of(family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loaded, _ = fused(model)
    assert isinstance(loaded.fused, FusedGpuModel)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], values) for name, values in before.items())
    own = {parameter.untyped_storage().data_ptr() for parameter in now.values()}
    for layer in loaded.fused.layers:
        for linear in (layer.inputs, layer.output, layer.gates, layer.down):
            for values in (linear.weight, linear.bias):
                assert values is None or values.untyped_storage().data_ptr() in own
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in now.values()}
    assert sum(storages.values()) == sum(values.nbytes for values in before.values())


@pytest.mark.parametrize(
    ("family", "says"),
    [("mixtral", "experts"), ("gpt_oss", "experts"), ("qwen3_moe", "experts"), ("deepseek_v3", "differ")],
)
def test_another_structure_is_left_alone(family: str, says: str) -> None:
    model = tiny_model(family)
    found = fuse_on_gpu(model, wrap(model, None, family).geometry, CpuBackend(), PlainRows())
    assert isinstance(found, str)
    assert says in found


def refused(model: Any, backend: Backend | None = None) -> str:
    found = fuse_on_gpu(model, wrap(model, None, "tiny").geometry, backend or CpuBackend(), PlainRows())
    assert isinstance(found, str)
    return found


def test_what_computes_something_else_is_left_alone() -> None:
    model = model_of("llama")
    plain = model.model.layers[1].self_attn.o_proj.forward
    model.model.layers[1].self_attn.o_proj.forward = lambda x: 1.8 * plain(x)
    assert "its logits differ by 0." in refused(model)
    model = model_of("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert refused(model) == "a linear layer (Sequential) is not a plain one"
    model = model_of("llama")
    model.model.layers[0].mlp.bfloat16()
    assert refused(model) == "its weights differ in type or device"
    assert refused(model_of("llama", torch.float16)) == "its weights are torch.float16"


def test_a_step_that_fails_when_tried_is_a_reason() -> None:
    class Failing(ReferenceBackend):
        def forward(self, *given: Any, **named: Any) -> Tensor:
            raise RuntimeError("no such instruction")

    assert refused(model_of("llama"), Failing()) == "it cannot be tried: RuntimeError: no such instruction"
