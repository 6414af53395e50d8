"""Decoder layers in C++ around the fused attention (``csrc/decoder``): a whole step is one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.config import WEIGHT_FORMATS
from kvbits.kernels import _native
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cpu import CpuBackend
from kvbits.pool import LayerView


class Products:
    """Multiplies bfloat16 rows with packed weights. A row's result does not depend on the rows beside it."""

    def __init__(self) -> None:
        self._cpu = CpuBackend()

    @property
    def name(self) -> str:
        """Kernels in use: ``avx512bf16``, ``avx512``, ``avx2`` or ``scalar`` (slower than torch's)."""
        return str(_native.row_kernels(self._cpu.isa))

    def pack(self, weight: Tensor, bias: Tensor | None, weight_format: str = "bf16") -> PackedWeight:
        """``weight`` ``bfloat16 [out, in]``, ``in`` even; ``bias`` ``[out]``. Both are copied.

        ``weight_format`` is ``"bf16"``, or ``"int8"``: codes of 8 bits with a scale for each output, to nearest; the
        inputs are then quantized to 8 bits too (7 on AVX2), each row with a scale of its own, when they arrive.
        """
        out_features, in_features = weight.shape
        assert weight.dtype == torch.bfloat16, weight.dtype
        assert in_features % 2 == 0, in_features
        assert weight_format in WEIGHT_FORMATS, weight_format
        weight = weight.detach().contiguous()
        plain = None if bias is None else bias.detach().float().contiguous().numpy()
        if weight_format == "bf16":
            native = _native.Linear(weight.data_ptr(), plain, out_features, in_features)
        else:
            wide = weight.float()
            scales = wide.abs().amax(dim=1).clamp_min(1e-30) / 127
            codes = (wide / scales[:, None]).round().to(torch.int8)
            native = _native.Linear(
                self._cpu.native, codes.data_ptr(), scales.numpy(), plain, out_features, in_features
            )
        return PackedWeight(out_features, in_features, native)

    def apply(self, weight: PackedWeight, x: Tensor) -> Tensor:
        """``x`` ``bfloat16 [..., in]`` times the weight: ``bfloat16 [..., out]``, added in float32."""
        assert x.dtype == torch.bfloat16, x.dtype
        rows = x.reshape(-1, weight.in_features)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = torch.empty(*x.shape[:-1], weight.out_features, dtype=torch.bfloat16)
        weight.native.apply(self._cpu.native, rows.data_ptr(), rows.stride(0), len(rows), out.data_ptr())
        return out


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[out, in]`` in the order in which the kernels read it."""

    out_features: int
    in_features: int
    native: _native.Linear


@dataclass(frozen=True)
class DecoderLayer:
    """The parts of one layer; norms ``float32``, ``[hidden]`` or ``[head size]``."""

    query: PackedWeight
    key: PackedWeight
    value: PackedWeight
    output: PackedWeight
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    input_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class DecoderShape:
    """Sizes, in elements; ``rotated``: how many of a head's first elements the rotary embedding turns."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    intermediate: int
    eps: float
    activation: str


class Decoder:
    """All layers, the last norm and the head of a model. ``activation`` is ``"silu"`` or ``"gelu_tanh"``."""

    def __init__(
        self, shape: DecoderShape, layers: Sequence[DecoderLayer], final_norm: Tensor, head: PackedWeight
    ) -> None:
        assert shape.activation in ("silu", "gelu_tanh"), shape.activation
        self._vocabulary = head.out_features
        self._rotated = shape.rotated
        self.native = _native.Decoder(
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.rotated,
            shape.intermediate,
            shape.eps,
            shape.activation == "gelu_tanh",
            [_layer(layer) for layer in layers],
            final_norm.numpy(),
            head.native,
        )

    def forward(
        self,
        backend: CpuBackend,
        views: Sequence[LayerView],
        batch: BatchLayout,
        embedded: Tensor,
        cos: Tensor,
        sin: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """Run a step; the pool behind ``views`` holds its tokens afterwards.

        ``embedded`` ``bfloat16 [rows, hidden]``; ``cos``, ``sin`` ``float32 [rows, rotated]``; ``wanted`` ``int64
        [n]``: rows whose logits are returned, ``float32 [n, vocabulary]``.
        """
        rows = batch.num_rows
        embedded, cos, sin, wanted = embedded.contiguous(), cos.contiguous(), sin.contiguous(), wanted.contiguous()
        assert embedded.dtype == torch.bfloat16, embedded.dtype
        assert len(embedded) == rows, (embedded.shape, rows)
        assert cos.shape == sin.shape == (rows, self._rotated), (cos.shape, sin.shape, rows)
        assert cos.dtype == sin.dtype == torch.float32, cos.dtype
        layers = [layer for layer in map(backend.layer, views) if layer is not None]
        assert len(layers) == len(views), (len(layers), len(views))
        logits = torch.empty(len(wanted), self._vocabulary)
        self.native.forward(
            backend.native,
            layers,
            backend.tables(batch),
            rows,
            embedded.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            wanted.data_ptr(),
            len(wanted),
            logits.data_ptr(),
        )
        return logits


def _layer(layer: DecoderLayer) -> _native.DecoderLayer:
    weights = (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down)
    norms = (layer.input_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
    return _native.DecoderLayer(
        *(weight.native for weight in weights), *(None if norm is None else norm.numpy() for norm in norms)
    )
