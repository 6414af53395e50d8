"""Mixtures of experts on packed weights (``csrc/decoder/experts.cpp``): one product for the rows of an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.kernels import _native
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.products import PackedWeight

_ACTIVATIONS = ("silu", "gelu_tanh", "clamped")
"""By the numbers of ``csrc/decoder/rows.h``."""


@dataclass(frozen=True)
class Gate:
    """What joins the halves of a gated MLP: ``activation(gate) * up``, by ``"silu"`` or ``"gelu_tanh"``.

    ``"clamped"`` is gpt-oss's: the gate at most ``limit`` and ``up`` within it, ``gate * sigmoid(alpha * gate) * (up +
    1)``.
    """

    activation: str = "silu"
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def native(self) -> _native.Gate:
        return _native.Gate(_ACTIVATIONS.index(self.activation), self.alpha, self.limit)


class Experts:
    """The experts of a layer: ``gates`` and ``ups`` ``[inner, hidden]``, ``downs`` ``[hidden, inner]``, one each."""

    def __init__(
        self, gates: Sequence[PackedWeight], ups: Sequence[PackedWeight], downs: Sequence[PackedWeight], gate: Gate
    ) -> None:
        assert len(gates) == len(ups) == len(downs) > 0, (len(gates), len(ups), len(downs))
        self.gates, self.ups, self.downs, self.gate = tuple(gates), tuple(ups), tuple(downs), gate
        self.native = _native.Experts(_natives(gates), _natives(ups), _natives(downs), gate.native)

    def __len__(self) -> int:
        return len(self.gates)

    def apply(self, cpu: CpuBackend, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """``x`` ``bfloat16 [rows, hidden]``; ``chosen``, ``shares`` ``[rows, n]``: each row's experts, and how much of
        each its sum takes. Returns ``float32 [rows, hidden]``; a row does not depend on the rows beside it."""
        assert x.dtype == torch.bfloat16, x.dtype
        assert chosen.shape == shares.shape == (len(x), chosen.shape[1]), (chosen.shape, shares.shape, x.shape)
        assert not chosen.numel() or 0 <= int(chosen.min()) <= int(chosen.max()) < len(self), chosen
        x, chosen, shares = x.contiguous(), chosen.to(torch.int32).contiguous(), shares.float().contiguous()
        sums = torch.zeros(x.shape, dtype=torch.float32)
        self.native.add(
            cpu.native, x.data_ptr(), len(x), chosen.shape[1], chosen.data_ptr(), shares.data_ptr(), sums.data_ptr()
        )
        return sums


def _natives(weights: Sequence[PackedWeight]) -> list[_native.Linear]:
    return [weight.native for weight in weights]
