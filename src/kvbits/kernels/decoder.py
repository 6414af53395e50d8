"""Decoder layers in C++ around the fused attention (``csrc/decoder``): a whole step is one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvbits.kernels import _native
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.experts import Experts, Gate
from kvbits.kernels.products import PackedWeight
from kvbits.pool import LayerView

W = TypeVar("W")
"""What a weight ``[out, in]`` is to whoever multiplies with it; here :class:`PackedWeight`."""


@dataclass(frozen=True)
class Mlp(Generic[W]):
    """A gated MLP."""

    gate: W
    up: W
    down: W


@dataclass(frozen=True)
class Mixture:
    """Each row goes to the ``chosen`` experts with the largest ``router`` outputs; their shares are a softmax over all
    experts or, ``among_chosen``, over these."""

    router: PackedWeight
    experts: Experts
    chosen: int
    among_chosen: bool

    @property
    def native(self) -> _native.Mixture:
        return _native.Mixture(self.router.native, self.experts.native, self.chosen, self.among_chosen)


@dataclass(frozen=True)
class DecoderLayer(Generic[W]):
    """The parts of one layer; norms ``float32``.

    ``input_norm`` and ``mlp_norm`` ``[hidden]`` before a block, ``attention_norm`` and ``output_norm`` after it;
    ``query_norm`` and ``key_norm`` of one head or of all heads together; ``sinks`` ``float32 [heads]``; ``rope`` the
    rotary table.
    """

    query: W
    key: W
    value: W
    output: W
    mlp: Mlp[W] | Mixture
    input_norm: Tensor | None = None
    attention_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    output_norm: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    sinks: Tensor | None = None
    rope: int = 0


@dataclass(frozen=True)
class DecoderShape:
    """Sizes, in elements; ``rotated``: how many of a head's first elements the rotary embedding turns; ``gate`` of the
    dense MLPs; ``soft_cap`` of the logits, 0 for none."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    eps: float
    gate: Gate
    soft_cap: float = 0.0


class Decoder:
    """All layers, the last norm and the head of a model."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer[PackedWeight]],
        final_norm: Tensor,
        head: PackedWeight,
    ) -> None:
        self._shape, self._vocabulary = shape, head.out_features
        self._parts = (tuple(layers), head)  # whose memory the native decoder reads
        self.native = _native.Decoder(
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.rotated,
            shape.eps,
            shape.soft_cap,
            shape.gate.native,
            [_layer(layer) for layer in layers],
            final_norm.numpy(),
            head.native,
        )

    @property
    def mixes(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return any(isinstance(layer.mlp, Mixture) for layer in self._parts[0])

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

        ``embedded`` ``bfloat16 [rows, hidden]``; ``cos``, ``sin`` ``float32 [tables, rows, rotated]``; ``wanted``
        ``int64 [n]``: rows whose logits are returned, ``float32 [n, vocabulary]``.
        """
        rows = batch.num_rows
        embedded, cos, sin, wanted = embedded.contiguous(), cos.contiguous(), sin.contiguous(), wanted.contiguous()
        assert embedded.dtype == torch.bfloat16, embedded.dtype
        assert len(embedded) == rows, (embedded.shape, rows)
        tables = 1 + max(layer.rope for layer in self._parts[0])
        assert cos.shape == sin.shape == (tables, rows, self._shape.rotated), (cos.shape, sin.shape, rows)
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


def _layer(layer: DecoderLayer[PackedWeight]) -> _native.DecoderLayer:
    mlp = layer.mlp
    dense, mixture = (mlp, None) if isinstance(mlp, Mlp) else (None, mlp)
    return _native.DecoderLayer(
        query=layer.query.native,
        key=layer.key.native,
        value=layer.value.native,
        output=layer.output.native,
        gate=None if dense is None else dense.gate.native,
        up=None if dense is None else dense.up.native,
        down=None if dense is None else dense.down.native,
        mixture=None if mixture is None else mixture.native,
        input_norm=_floats(layer.input_norm),
        attention_norm=_floats(layer.attention_norm),
        mlp_norm=_floats(layer.mlp_norm),
        output_norm=_floats(layer.output_norm),
        query_norm=_floats(layer.query_norm),
        key_norm=_floats(layer.key_norm),
        sinks=_floats(layer.sinks),
        rope=layer.rope,
    )


def _floats(part: Tensor | None) -> np.ndarray | None:
    return None if part is None else part.numpy()
