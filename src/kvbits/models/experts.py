"""Mixtures of experts with their weights packed, in the place of transformers' modules.

transformers keeps the experts of a layer in two parameters and says how (``use_experts_implementation``): gate and up
side by side or in turns, transposed or not, with biases or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.kernels.experts import Experts, Gate
from kvbits.kernels.products import PackedWeight, Products
from kvbits.models.stored import StoredParameter
from kvbits.weights import WeightFormat

Part = tuple[Tensor, Tensor | None]
"""A weight ``[out, in]`` and its bias, views of a parameter."""


class PackedExperts(nn.Module):
    """The experts of a layer; called as transformers' modules are, the same bits whatever rows lie beside a row."""

    def __init__(self, experts: Experts, products: Products) -> None:
        super().__init__()
        self.experts = experts
        self._products = products

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = self.experts.apply(self._products.backend, hidden_states, top_k_index, top_k_weights)
        return out.to(hidden_states.dtype)

    def packed(self) -> Iterator[tuple[str, PackedWeight]]:
        """Every weight with a name."""
        for name, part in zip(("gate", "up", "down"), self._parts(), strict=True):
            for e, weight in enumerate(part):
                yield f"{name}.{e}", weight

    def stored(self) -> Iterator[tuple[str, tuple[int, int, int], Callable[[Tensor], Tensor]]]:
        """transformers' parameters, where they are not transposed and lie side by side: name, shape, and what unpacks
        rows, ``int64 [n]``, which are counted through all experts."""
        gates, ups, downs = self._parts()
        inner, hidden = gates[0].out_features, gates[0].in_features
        both = [weight for pair in zip(gates, ups, strict=True) for weight in pair]
        yield "gate_up_proj", (len(gates), 2 * inner, hidden), partial(_rows_of, both)
        yield "down_proj", (len(gates), hidden, inner), partial(_rows_of, downs)

    def _parts(self) -> tuple[tuple[PackedWeight, ...], ...]:
        return self.experts.gates, self.experts.ups, self.experts.downs


def _rows_of(weights: Sequence[PackedWeight], rows: Tensor) -> Tensor:
    """Some rows of weights of one shape that lie one after the other: ``float32 [n, in]``."""
    size = weights[0].out_features
    return torch.cat([weights[row // size].unpack(torch.tensor([row % size])) for row in rows.tolist()])


def gate_of(module: nn.Module) -> Gate | None:
    """How the experts of ``module`` are gated; ``None`` for what holds none, or others than the kernels know."""
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    biases = {"gate_up_proj_bias", "down_proj_bias"} if getattr(module, "has_bias", False) else set()
    if not hasattr(module, "_apply_gate") or parameters != {"gate_up_proj", "down_proj"} | biases:
        return None
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    return _known_gate(module)


def experts_parts(module: Any, index: int) -> tuple[Part, Part, Part]:
    """Gate, up and down of one expert of a module with a :func:`gate_of`."""
    both, down = (_one(parameter, index) for parameter in (module.gate_up_proj, module.down_proj))
    both, down = (both.T, down.T) if module.is_transposed else (both, down)
    biases = (module.gate_up_proj_bias[index], module.down_proj_bias[index]) if module.has_bias else (None, None)
    left, right = _halves(module, len(both))
    bias = biases[0]
    gate_bias, up_bias = (None, None) if bias is None else (bias[left], bias[right])
    return (both[left], gate_bias), (both[right], up_bias), (down, biases[1])


@torch.no_grad()
def pack_experts(module: Any, gate: Gate, products: Products, weight_format: WeightFormat) -> PackedExperts:
    """``module`` on packed weights, rounded to ``weight_format``."""
    packed = [
        [products.pack(weight, bias, weight_format) for weight, bias in experts_parts(module, index)]
        for index in range(len(module.gate_up_proj))
    ]
    for parameter in (module.gate_up_proj, module.down_proj):
        if isinstance(parameter, StoredParameter):
            parameter.release(0, len(parameter) * parameter.shape[1])
    gates, ups, downs = (list(part) for part in zip(*packed, strict=True))
    return PackedExperts(Experts(gates, ups, downs, gate), products)


def _one(parameter: nn.Parameter, index: int) -> Tensor:
    if isinstance(parameter, StoredParameter) and parameter.is_meta:
        return parameter.read(index * parameter.shape[1], (index + 1) * parameter.shape[1])
    return parameter[index]


def _halves(module: Any, rows: int) -> tuple[slice, slice]:
    """Where gate and up are among ``rows`` of both."""
    if module.is_concatenated:
        return slice(None, rows // 2), slice(rows // 2, None)
    return slice(0, None, 2), slice(1, None, 2)


@torch.inference_mode()
def _known_gate(module: Any) -> Gate | None:
    """By what it does."""
    g, u = torch.linspace(-9, 9, 61).repeat(61), torch.linspace(-9, 9, 61).repeat_interleave(61)
    both = torch.empty(2 * len(g))
    left, right = _halves(module, len(both))
    both[left], both[right] = g, u
    try:
        found = module._apply_gate(both)
    except (AttributeError, RuntimeError):
        return None
    alpha, limit = (float(getattr(module, name, 0.0) or 0.0) for name in ("alpha", "limit"))
    held, within = g.clamp(max=limit), u.clamp(-limit, limit)
    known = {
        Gate("silu"): nn.functional.silu(g) * u,
        Gate("gelu_tanh"): nn.functional.gelu(g, approximate="tanh") * u,
        Gate("clamped", alpha, limit): held * torch.sigmoid(held * alpha) * (within + 1),
    }
    return next((gate for gate, y in known.items() if torch.allclose(found, y, rtol=1e-5, atol=1e-5)), None)
