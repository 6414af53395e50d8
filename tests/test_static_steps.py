"""Steps over static layouts, as graphs replay them: the same bytes as the same steps over layouts of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.attention import make_inputs
from helpers.driver import Frames
from helpers.emulated import COMPILER, Emulation
from torch import Tensor

from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.kernels.reference import ReferenceBackend
from kvbits.kernels.static import refill, static_layout

pytest.importorskip("triton", reason="Triton exists for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STARTS = (62, 130, 5)
LAYER = LayerGeometry(3, 1, 64, 64, 64**-0.5)
pytestmark = pytest.mark.triton


def run(backend: Backend, dtype: str, static: bool, emulation: Emulation | None = None) -> list[Tensor]:
    """Results and the pool's bytes: two steps of a token of each of three sequences, one of two of them."""
    geometry = ModelGeometry("test", (LAYER, LAYER), 8192, 16)
    frames = Frames(geometry, dtype, 40)
    pool = frames.pool
    view = pool.layers[1]
    inputs = make_inputs(LAYER, [start + 3 for start in STARTS])
    rows = [[x.bfloat16() for x in part] for part in (inputs.query, inputs.key, inputs.value)]
    sinks = pool.layout.sink.frames if pool.layout.sink else 0
    layouts = [static_layout(4, 16, pool.layout.open.frames, sinks, completes=completes) for completes in (False, True)]
    found = []

    def step(batch: BatchLayout, parts: list[Tensor]) -> None:
        found.append(backend.forward(view, batch, *parts, None)[: len(parts[0])])

    prompts = BatchLayout.of([frames.slice(s, start) for s, start in enumerate(STARTS)])
    parts = [torch.cat([x[:start] for x, start in zip(part, STARTS, strict=True)]) for part in rows]
    ReferenceBackend().forward(view, prompts, *parts, None)
    buffer = pool.buffer.to(DEVICE)
    view = replace(view, buffer=buffer)
    rows = [[x.to(DEVICE) for x in part] for part in rows]
    if emulation is not None:
        emulation.pool = buffer
    if static:  # recorded without a sequence: nothing may change
        before = buffer.clone()
        for layout in layouts:
            step(layout, [part[0].new_zeros(4, *part[0].shape[1:]) for part in rows])
            found.pop()
            assert torch.equal(buffer, before)
    for new, sequences in enumerate(((0, 1, 2), (0, 1, 2), (0, 2))):
        slices = [frames.slice(s, 1) for s in sequences]
        batch = BatchLayout.of(slices)
        if new == 2:  # its first sequence begins a page, which somebody else had before
            at, size = view.open.offset, view.open.scheme.layer_bytes(LAYER)
            buffer[slices[0].tail[view.open.frame], at : at + size] = 0x41
        assert batch.completes == (new == 1)
        parts = [torch.stack([part[s][STARTS[s] + new] for s in sequences]) for part in rows]
        if static:
            layout = layouts[batch.completes]
            addresses = {id(x): x.data_ptr() for x in tensors(layout)}
            refill(layout, batch)
            batch = layout
            parts = [torch.cat([part, part.new_zeros(4 - len(part), *part.shape[1:])]) for part in parts]
        step(batch, parts)
        found[-1] = found[-1][: len(sequences)]
        if static:
            assert {id(x): x.data_ptr() for x in tensors(layout)} == addresses
    return [*found, buffer.clone()]


def tensors(layout: BatchLayout) -> list[Tensor]:
    """All tables on the device."""
    made = [part for value in layout.shared.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [x for part in made for x in getattr(part, "__dict__", {}).values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("dtype", ["int4", "nf4+sink:int8"])
def test_triton_kernels(dtype: str) -> None:
    from kvbits.kernels.triton.backend import TritonBackend

    own, static = (run(TritonBackend(DEVICE), dtype, static) for static in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(own, static, strict=True))


@pytest.mark.skipif(COMPILER is None or DEVICE == "cuda", reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["int4", "int8+sink:bf16"])
def test_cuda_kernels(tmp_path: Path, dtype: str) -> None:
    """They store rows themselves where no page is completed: the bytes are those of Triton's kernels."""
    from kvbits.kernels.cuda.backend import CudaBackend
    from kvbits.kernels.triton.backend import TritonBackend

    results = []
    for static in (False, True):
        emulation = Emulation(tmp_path)
        results.append(run(CudaBackend(DEVICE, True, emulation, 4), dtype, static, emulation))
        assert emulation.launched
        assert not emulation.faults
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][-1], run(TritonBackend(DEVICE), dtype, False)[-1])
