"""Decoder layers in C++ around the fused attention (``csrc/decoder``): a whole step is one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.kernels import _native
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.products import PackedWeight
from kvbits.pool import LayerView


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
