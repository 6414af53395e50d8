"""The kernels between products and attention against torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.plain_rows import PlainRows
from helpers.tiny import tiny_model
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_KINDS = ["sliding_attention", "full_attention"]
TYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Up to the last bits of the numbers, which are about one, or of what is subtracted."""
    assert found.dtype == expected.dtype
    relative, absolute = (2.0**-7, 2.0**-10) if found.dtype == torch.bfloat16 else (2.0**-20, 2.0**-21)
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [64, 200])
def test_sums_and_norms(width: int, dtype: torch.dtype) -> None:
    from kvbits.kernels.triton.elementwise import add_norm
    from kvbits.kernels.triton.launch import run

    after, before = numbers(width, seed=1), numbers(width, seed=2)
    for delta, norms in (
        (None, (None, before)), (1, (None, before)), (1, (after, before)), (1, (after, None)), (1, (None, None)),
    ):  # fmt: skip
        added = None if delta is None else numbers(3, width, dtype=dtype, seed=3)
        found, expected = [], []
        for launch, results in ((run, found), (PlainRows(), expected)):
            x = numbers(3, width, dtype=dtype)
            results += [add_norm(launch, x, added, *norms, 1e-5), x]
        for got, wanted in zip(found, expected, strict=True):
            assert_close(got, wanted)
        assert (found[0] is found[1]) == (norms[1] is None)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turned_dim", "norm"),
    [
        (4, 2, 16, 16, None),
        (3, 1, 24, 24, "head"),
        (9, 3, 32, 20, "head"),
        (6, 3, 16, 16, "whole"),
        (2, 2, 24, 16, "whole"),
        (12, 12, 16, 8, None),
    ],
)
def test_heads(heads: int, kv_heads: int, dim: int, turned_dim: int, norm: str | None, dtype: torch.dtype) -> None:
    from kvbits.kernels.triton.elementwise import turned
    from kvbits.kernels.triton.launch import run

    sizes = {None: (0, 0), "head": (dim, dim), "whole": (heads * dim, kv_heads * dim)}[norm]
    norms = tuple(numbers(size, seed=size) if size else None for size in sizes)
    source = numbers(2, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=5)
    cos, sin = numbers(2, turned_dim, seed=6), numbers(2, turned_dim, seed=7)
    found, expected = (turned(launch, source, heads, kv_heads, norms, cos, sin, 1e-5) for launch in (run, PlainRows()))
    assert [x.shape for x in found] == [(2, n, dim) for n in (heads, kv_heads, kv_heads)]
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got, wanted)
    assert torch.equal(found[2].flatten(1), source[:, (heads + kv_heads) * dim :])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates(activation: str, dtype: torch.dtype) -> None:
    from kvbits.kernels.triton.elementwise import gated
    from kvbits.kernels.triton.launch import run

    source = 4 * numbers(3, 2 * 1100, dtype=dtype)
    source[0, :4] = torch.tensor([100.0, -100.0, 1e4, -1e4])
    assert_close(gated(run, source, activation), gated(PlainRows(), source, activation))


@pytest.mark.triton
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "olmo2"])
def test_a_model_runs_fused(family: str) -> None:
    """On a GPU as every model there does; in the interpreter around the CPU's attention."""
    from kvbits.kernels import default_backend
    from kvbits.models.fused_gpu import FusedGpuModel, fuse_on_gpu
    from kvbits.models.load import wrap
    from kvbits.models.trial import disagreement

    changes: dict[str, Any] = {"layer_types": TWO_KINDS} if family == "gemma3_text" else {}
    model = tiny_model(family, num_hidden_layers=2, head_dim=64, **changes).to(DEVICE)
    loaded = wrap(model, None, family)
    fused = loaded.fused if DEVICE != "cpu" else fuse_on_gpu(model, loaded.geometry)
    assert isinstance(fused, FusedGpuModel), fused
    assert disagreement(model, loaded.geometry, fused.forward, default_backend(DEVICE), 3, 1e-3) is None
