"""Products of bfloat16 rows with weights in any format of :mod:`kvbits.weights` (``csrc/weights``)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbits.kernels import _native
from kvbits.kernels.cpu import CpuBackend
from kvbits.weights import FORMATS, WeightFormat

STRIP = int(_native.STRIP_OUTPUTS)
"""Outputs that lie together in a packed weight."""

_PART = 1 << 19
"""Weights that are rounded and packed at a time: with more, memory for numbers on the way is mapped anew each time."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[out, in]`` in the order in which the kernels read it."""

    out_features: int
    in_features: int
    weight_format: WeightFormat
    native: _native.Linear
    bias: Tensor | None = None
    """``float32 [out]``."""

    @classmethod
    def empty(
        cls, out_features: int, in_features: int, weight_format: WeightFormat, bias: Tensor | None = None
    ) -> PackedWeight:
        """Memory for a weight, to be filled; ``bias`` ``[out]`` is copied."""
        kept = None if bias is None else bias.detach().float().contiguous()
        plain = None if kept is None else kept.numpy()
        native = _native.Linear(weight_format.native_id, plain, out_features, in_features)
        return cls(out_features, in_features, weight_format, native, kept)

    @property
    def bytes(self) -> int:
        return int(self.native.bytes)

    @property
    def strips(self) -> int:
        """Pieces of :data:`STRIP` outputs that :meth:`fill` can take one by one."""
        return int(self.native.strips)

    def fill(self, rows: np.ndarray, order: np.ndarray | None = None, first: int = 0, last: int | None = None) -> None:
        """Take strips ``first`` to ``last - 1`` from ``rows`` ``uint8 [out, bytes]``, the format's blocks.

        Row ``o`` of the weight is ``rows[order[o]]``. Other strips may be filled in other threads meanwhile.
        """
        needed = -(-self.in_features // self.weight_format.block) * self.weight_format.block_bytes
        assert rows.dtype == np.uint8, rows.dtype
        assert rows.shape == (self.out_features, needed), (rows.shape, self)
        assert rows.strides[1] == 1, rows.strides
        assert order is None or (order.dtype == np.int64 and order.shape == (self.out_features,)), order
        last = self.strips if last is None else last
        assert 0 <= first <= last <= self.strips, (first, last)
        at = 0 if order is None else order.ctypes.data
        self.native.fill(rows.ctypes.data, rows.strides[0], at, first, last)

    def fill_part(self, rows: np.ndarray, first: int) -> None:
        """As :meth:`fill` with ``rows`` of the outputs from ``first`` on, a multiple of :data:`STRIP`, alone."""
        assert first % STRIP == 0, first
        assert len(rows) % STRIP == 0 or first + len(rows) == self.out_features, (first, rows.shape)
        assert rows.shape[1] == -(-self.in_features // self.weight_format.block) * self.weight_format.block_bytes
        assert rows.dtype == np.uint8, rows.dtype
        assert rows.strides[1] == 1, rows.strides
        last = -(-(first + len(rows)) // STRIP)
        self.native.fill(rows.ctypes.data - first * rows.strides[0], rows.strides[0], 0, first // STRIP, last)

    def part(self, first: int, count: int) -> PackedWeight:
        """``count`` of the outputs from ``first`` on, in the same memory; both are multiples of :data:`STRIP`, but for
        an end that is the weight's own. Raises ``ValueError`` for others."""
        last = first + count
        if first % STRIP or (last != self.out_features and last % STRIP):
            raise ValueError(f"outputs {first} to {last - 1} are no whole strips of {STRIP}")
        assert 0 <= first < last <= self.out_features, (first, count, self)
        bias = None if self.bias is None else self.bias[first:last]
        return PackedWeight(count, self.in_features, self.weight_format, self.native.part(first, count), bias)

    def unpack(self, rows: Tensor) -> Tensor:
        """The weights of some outputs, ``int64 [n]``, as ``float32 [n, in]``: exactly what the bytes say."""
        rows = rows.reshape(-1).to(torch.int64).contiguous()
        assert not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < self.out_features, rows
        out = torch.empty(len(rows), self.in_features)
        self.native.unpack(rows.data_ptr(), len(rows), out.data_ptr())
        return out


class Products:
    """Multiplies bfloat16 rows with packed weights. A row's result does not depend on the rows beside it."""

    def __init__(self, isa: str = "auto", threads: int | None = None) -> None:
        self.backend = CpuBackend(isa, threads)

    @property
    def name(self) -> str:
        """Kernels of bfloat16 weights: ``avx512bf16``, ``avx512``, ``avx2`` or ``scalar`` (slower than torch's)."""
        return str(_native.row_kernels(self.backend.isa))

    @property
    def isa(self) -> str:
        """Kernels of weights in bits."""
        return str(_native.product_kernels(self.backend.isa))

    def pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_format: WeightFormat = FORMATS["bf16"],
        done: Callable[[Tensor], None] | None = None,
    ) -> PackedWeight:
        """``weight`` ``[out, in]``, rounded to the format, a few rows at a time, which ``done`` then gets; ``bias``
        ``[out]``. Both are copied."""
        out_features, in_features = weight.shape
        packed = PackedWeight.empty(out_features, in_features, weight_format, bias)
        step = max(STRIP, _PART // in_features // STRIP * STRIP)

        def pack_from(first: int) -> None:
            part = weight.detach()[first : first + step]
            packed.fill_part(weight_format.encode(part).numpy(), first)
            if done is not None:
                done(part)

        # Rounding computes in torch's own threads.
        with ThreadPoolExecutor(1 if weight_format.rounds_inputs else torch.get_num_threads()) as threads:
            for finished in [threads.submit(pack_from, first) for first in range(0, out_features, step)]:
                finished.result()
        return packed

    def apply(self, weight: PackedWeight, x: Tensor) -> Tensor:
        """``x`` ``bfloat16 [..., in]`` times the weight: ``bfloat16 [..., out]``, added in float32."""
        assert x.dtype == torch.bfloat16, x.dtype
        rows = x.reshape(-1, weight.in_features)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = torch.empty(*x.shape[:-1], weight.out_features, dtype=torch.bfloat16)
        weight.native.apply(self.backend.native, rows.data_ptr(), rows.stride(0), len(rows), out.data_ptr())
        return out
