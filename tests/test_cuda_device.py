"""The backend 'cuda' as a whole: on a GPU where there is one, else Triton interpreted and the CUDA kernels emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.attention import make_inputs, run
from helpers.emulated import COMPILER, Emulation, error_of
from torch import Tensor

from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.errors import UnsupportedError
from kvbits.kernels import Backend, BatchLayout
from kvbits.kernels.reference import ReferenceBackend
from kvbits.pool import LayerView

pytest.importorskip("triton", reason="Triton exists for Linux only")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYER = LayerGeometry(8, 2, 64, 64, 64**-0.5)
pytestmark = [pytest.mark.triton, pytest.mark.skipif(COMPILER is None and not ON_GPU, reason="needs a C++ compiler")]


class CudaOnDevice(Backend):
    """The backend 'cuda' for pools and rows in host memory."""

    name = "cuda on a device"

    def __init__(self, folder: Path) -> None:
        from kvbits.kernels.cuda.backend import CudaBackend

        self.emulation = None if ON_GPU else Emulation(folder)
        self._inner = CudaBackend(DEVICE, True, self.emulation, 4 if self.emulation else 0)

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return self._inner.supports(scheme, layer)

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        buffer = view.buffer.to(DEVICE)
        if self.emulation is not None:
            self.emulation.pool = buffer
        rows = (x.to(DEVICE) for x in (query, key, value))
        sinks = None if sinks is None else sinks.to(DEVICE)
        out = self._inner.forward(replace(view, buffer=buffer), batch, *rows, sinks)
        view.buffer.copy_(buffer)
        return out.cpu()


@pytest.mark.parametrize("dtype", ["int4", "nf4+sink:int8", "bf16/int2"])
def test_prompts_and_steps(tmp_path: Path, dtype: str) -> None:
    """A prompt by Triton, then a step of few tokens over a page boundary and a single one, by the CUDA kernels."""
    backend = CudaOnDevice(tmp_path)
    layer = replace(LAYER, window=150, sinks=True)
    inputs = make_inputs(layer, [195, 131])
    for rows in (inputs.query, inputs.key, inputs.value):
        rows[:] = [x.bfloat16().float() for x in rows]
    expected, expected_pages = run(ReferenceBackend(), layer, dtype, inputs, 65)
    got, got_pages = run(backend, layer, dtype, inputs, 65, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got_pages, expected_pages, strict=True))
    assert max(error_of(a.float(), b) for a, b in zip(got, expected, strict=True)) < 5e-3
    if backend.emulation is not None:
        assert backend.emulation.launched
        assert not backend.emulation.faults


def test_float32_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the backend 'cuda' takes bfloat16 rows"):
        run(CudaOnDevice(tmp_path), LAYER, "int4", make_inputs(LAYER, [1]))
