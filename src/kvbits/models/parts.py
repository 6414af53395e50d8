"""The parts of a decoder layer that the fused path has, each recognised by what it does where that can be tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kvbits.kernels.decoder import Mixture, Mlp
from kvbits.kernels.experts import Gate
from kvbits.kernels.products import Products
from kvbits.models.experts import PackedExperts

_TRIED_ROWS = 8
_NORM_ERROR, _ROUTER_ERROR = 0.01, 0.05
"""Relative, of bfloat16 results against float32."""

_ROUTERS = ("gate", "router")
_ACTIVATIONS = ("act_fn", "activation_fn")


class Different(Exception):
    """What the model has that the fused path has not."""


def expect(module: nn.Module, needed: frozenset[str], allowed: frozenset[str] = frozenset()) -> None:
    """Raise :class:`Different` for a module with other children; dropout is none."""
    found = {name for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
    odd = sorted((needed - found) | (found - needed - allowed))
    if odd:
        raise Different(f"{type(module).__name__} differs in {', '.join(odd)}")


class Weight(Protocol):
    """The weight ``[out, in]`` of a linear layer, in the form that a decoder multiplies with."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def part(self, first: int, count: int) -> Any:
        """The weight of ``count`` outputs from ``first`` on, in the same memory."""


W = TypeVar("W", bound=Weight)

Weigh = Callable[[Any], W]
"""A linear layer's weight; raises :class:`Different` for a layer that it is not in."""


def split(whole: W, sizes: Sequence[int]) -> list[W]:
    """The weights of layers that one linear layer joins, of ``sizes`` outputs."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    odd = Different(f"a linear layer joins parts of {', '.join(map(str, sizes))} outputs")
    if sum(sizes) != whole.out_features:
        raise odd
    try:
        return [whole.part(start, size) for start, size in zip(starts, sizes, strict=True)]
    except ValueError as error:
        raise odd from error


def called(module: Any, *given: Any) -> Any:
    """What a part of the model gives when it is tried; :class:`Different` where it takes something else."""
    try:
        return module(*given)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise Different(f"{type(module).__name__} cannot be tried: {' '.join(str(error).split())[:100]}") from error


def epsilon(norm: Any) -> float:
    """What a norm adds to the mean square."""
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return float(getattr(norm, name))
    raise Different(f"{type(norm).__name__} names no epsilon")


@torch.inference_mode()
def norm_weight(norm: Any) -> Tensor:
    """What a root mean square norm multiplies with, ``float32``: its weight, or one more."""
    if {name for name, _ in norm.named_parameters()} != {"weight"}:
        raise Different(f"{type(norm).__name__} is not a plain root mean square norm")
    weight: Tensor = norm.weight.detach().float().contiguous()
    x = _random(_TRIED_ROWS, len(weight)).to(weight.device)
    wide = x.float()
    plain = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon(norm))
    found = called(norm, x).float()
    error, chosen = min(
        ((_relative(found, plain * tried), tried) for tried in (weight, 1 + weight)), key=lambda pair: pair[0]
    )
    if not error < _NORM_ERROR:
        raise Different(f"{type(norm).__name__} differs from a root mean square norm")
    return chosen


@dataclass(frozen=True)
class Rope:
    """Rotary angles by the model's own module, for each of ``kinds`` of layers (``None``: the same for all)."""

    module: nn.Module
    kinds: tuple[str | None, ...]
    halves: bool
    """Whether the module gives the angles of a half, which are those of the other too."""

    @classmethod
    @torch.inference_mode()
    def of(cls, module: nn.Module, layer_types: Sequence[str] | None) -> Rope:
        by_kind = "layer_type" in inspect.signature(module.forward).parameters
        if by_kind and not layer_types:
            raise Different("its layers have no types, by which it rotates")
        rope = cls(module, tuple(dict.fromkeys(layer_types or ())) if by_kind else (None,), False)
        cos = rope.tables(torch.ones(1, dtype=torch.long, device=_device(module)))[0][0, 0]
        middle = len(cos) // 2
        return cls(module, rope.kinds, not torch.equal(cos[:middle], cos[middle:]))

    @property
    def rotated(self) -> int:
        """How many of a head's first elements are turned."""
        return self.tables(torch.zeros(1, dtype=torch.long, device=_device(self.module)))[0].shape[-1]

    def table(self, layer_type: str | None) -> int:
        """Which of :meth:`tables` a layer uses."""
        return 0 if self.kinds == (None,) else self.kinds.index(layer_type)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``float32 [kinds, rows, rotated]`` at ``positions`` ``int64 [rows]``."""
        where = torch.empty(1, device=positions.device), positions.unsqueeze(0)
        found = [called(self.module, *where, *(() if kind is None else (kind,))) for kind in self.kinds]
        cos, sin = (torch.cat(parts) for parts in zip(*found, strict=True))
        return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if self.halves else (cos, sin)


def mlp(module: Any, weigh: Weigh[W]) -> tuple[Mlp[W] | Mixture, Gate | None]:
    """The MLP of a layer, and the gate of a dense one."""
    if isinstance(getattr(module, "experts", None), PackedExperts):
        return _mixture(module), None
    names = {name for name, _ in module.named_children()}
    act = next((name for name in _ACTIVATIONS if name in names), _ACTIVATIONS[0])
    if "gate_up_proj" in names:
        expect(module, frozenset({"gate_up_proj", "down_proj", act}))
        inner = weigh(module.down_proj).in_features
        gate, up = split(weigh(module.gate_up_proj), (inner, inner))
    else:
        expect(module, frozenset({"gate_proj", "up_proj", "down_proj", act}))
        gate, up = weigh(module.gate_proj), weigh(module.up_proj)
    return Mlp(gate, up, weigh(module.down_proj)), _gate(getattr(module, act))


def _gate(activation: nn.Module) -> Gate:
    x = torch.linspace(-4, 4, 33)
    with torch.inference_mode():
        y = called(activation, x)
    if torch.allclose(y, nn.functional.silu(x), atol=1e-6):
        return Gate("silu")
    if torch.allclose(y, nn.functional.gelu(x, approximate="tanh"), atol=1e-6):
        return Gate("gelu_tanh")
    raise Different(f"its activation is {type(activation).__name__}")


def _mixture(module: Any) -> Mixture:
    name = next((name for name in _ROUTERS if hasattr(module, name)), _ROUTERS[0])
    expect(module, frozenset({name, "experts"}))
    router, experts = getattr(module, name), module.experts.experts
    chosen = getattr(router, "top_k", None)
    if {name for name, _ in router.named_parameters()} - {"bias"} != {"weight"} or not isinstance(chosen, int):
        raise Different(f"{type(router).__name__} is no router of weight and bias")
    bias = getattr(router, "bias", None)
    among = _among_chosen(router, chosen)
    return Mixture(Products().pack(router.weight, bias), experts, chosen, among)


@torch.inference_mode()
def _among_chosen(router: Any, chosen: int) -> bool:
    """Whether its shares are a softmax over the chosen experts, not over all; it must take those with the largest
    products."""
    x = _random(_TRIED_ROWS, router.weight.shape[1])
    bias = router.bias.float() if getattr(router, "bias", None) is not None else None
    logits = nn.functional.linear(x.float(), router.weight.float(), bias)
    result = called(router, x)
    odd = Different(f"{type(router).__name__} does not take the experts with the largest products, by a softmax")
    if not isinstance(result, tuple) or len(result) != 3 or result[1].shape != (len(x), chosen):
        raise odd
    shares, indices = result[1].float(), result[2]
    taken = logits.gather(1, indices)
    if not (taken.amin(1) >= logits.topk(chosen).values.amin(1) - _ROUTER_ERROR * logits.abs().amax(1)).all():
        raise odd
    ways = {True: taken.softmax(1), False: logits.softmax(1).gather(1, indices)}
    among = min(ways, key=lambda way: _relative(shares, ways[way]))
    if not _relative(shares, ways[among]) < _ROUTER_ERROR:
        raise odd
    return among


def _device(module: nn.Module) -> torch.device:
    """Where a module without parameters computes."""
    return next((buffer.device for buffer in module.buffers()), torch.device("cpu"))


def _random(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator).to(torch.bfloat16)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
