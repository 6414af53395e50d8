"""The Triton backend for tensors in host memory: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.pool import LayerView

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class OnDevice(Backend):
    """The Triton backend for pools and rows in host memory, which it copies to the device and back."""

    name = "triton on a device"

    def __init__(self) -> None:
        from kvbits.kernels.triton.backend import TritonBackend

        self.inner = TritonBackend(DEVICE)

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return self.inner.supports(scheme, layer)

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        buffer = view.buffer.to(DEVICE)
        out = self.inner.forward(
            replace(view, buffer=buffer),
            batch,
            *(x.to(DEVICE) for x in (query, key, value)),
            None if sinks is None else sinks.to(DEVICE),
        )
        view.buffer.copy_(buffer)
        return out.cpu()
