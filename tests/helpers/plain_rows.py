"""The kernels of ``kvbits.kernels.triton.elementwise`` by torch, in float64, in place of their launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainRows:
    """Takes the place of ``launch`` and counts by kernel."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.running = False

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        name = kernel.fn.__name__
        self.launches.append(name)
        self.running = True
        {"add_norm_rows": add_norm, "turn_heads": turn, "gate_rows": gate}[name](*args, **constants)
        self.running = False


def normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def add_norm(
    x: Tensor, delta: Tensor | None, after: Tensor | None, before: Tensor | None, out: Tensor | None, eps: float,
    **constants: Any,
) -> None:  # fmt: skip
    if delta is not None:
        added = delta.double() if after is None else normed(delta.double(), eps) * after
        x.copy_(x.double() + added)
    if before is not None and out is not None:
        out.copy_(normed(x.double(), eps) * before)


def turn(
    source: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, cos: Tensor, sin: Tensor, out: Tensor,
    eps: float, HEADS: int, KV_HEADS: int, DIM: int, TURNED: int, **constants: Any,
) -> None:  # fmt: skip
    rows = source.double().view(len(source), -1, DIM)
    for norm, first, count in ((query_norm, 0, HEADS), (key_norm, HEADS, KV_HEADS)):
        x = rows[:, first : first + count]
        if norm is not None:
            shape = x.shape if len(norm) == DIM else (len(x), 1, count * DIM)
            x = (normed(x.reshape(shape), eps) * norm).view(x.shape)
        turned, rest = x[..., :TURNED], x[..., TURNED:]
        low, high = turned.chunk(2, -1)
        turned = turned * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
        out[:, first : first + count] = torch.cat([turned, rest], -1).to(out.dtype)


def gate(source: Tensor, out: Tensor, GELU: bool, **constants: Any) -> None:
    gates, ups = source.double().chunk(2, -1)
    act = torch.nn.functional.gelu(gates, approximate="tanh") if GELU else torch.nn.functional.silu(gates)
    out.copy_(act * ups)
