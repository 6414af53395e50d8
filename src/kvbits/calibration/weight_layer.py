"""One decoder layer's linear layers, rounded on the inputs that the layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kvbits.calibration.boundary import Call
from kvbits.calibration.weight_feedback import output_error, round_with_feedback
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.packed import settle
from kvbits.models.safetensors.pack import packed_tensors
from kvbits.models.stored import StoredParameter
from kvbits.weights.base import GROUP
from kvbits.weights.integers import nearest


def rounded_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers of ``module`` that are rounded: plain ones whose inputs groups of 32 divide."""
    found = {name: part for name, part in module.named_modules() if type(part) is nn.Linear}
    return {name: part for name, part in found.items() if part.in_features % GROUP == 0}


@dataclass
class _Shared:
    """Linear layers with the same input, and the sum of ``x x^T`` over it."""

    linears: dict[str, nn.Linear] = field(default_factory=dict)
    metric: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.metric is None:
            self.metric = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.metric.addmm_(rows.T, rows)


@torch.no_grad()
def round_layer(
    layer: nn.Module,
    prefix: str,
    hidden: list[Tensor],
    calls: Sequence[Call],
    bits: int,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> tuple[dict[str, Tensor], list[float]]:
    """Round ``layer``, whose names begin with ``prefix``, and replace ``hidden``, a window each, by its output then.

    Returns its tensors, what is not rounded as ``dtype``, and the squared errors of the products as shares of those of
    rounding to nearest. ``progress`` is told the tokens of each of the two passes. Raises ``ConfigError`` for weights
    or inputs that are not finite.
    """
    stored = [part for part in layer.parameters() if isinstance(part, StoredParameter)]
    settle(layer, torch.float32)
    for part in stored:
        part.release(0, part.numel() // part.shape[-1])
    linears = rounded_linears(layer)
    weights = {id(linear.weight) for linear in linears.values()}
    tensors: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        if id(parameter) not in weights:
            tensors[f"{prefix}.{name}"] = parameter.detach().to(dtype)
            parameter.data = parameter.detach().to(dtype).float()  # as it will be loaded
    shares: list[float] = []
    for shared in _inputs(layer, linears, hidden, calls, progress):
        tensors |= _round(shared, prefix, bits, dtype, shares)
    for index, call in enumerate(calls):
        hidden[index] = call.run(layer, hidden[index])
        progress(hidden[index].shape[1])
    layer.to("meta")
    return tensors, shares


def _inputs(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    progress: Callable[[int], None],
) -> list[_Shared]:
    """The inputs of ``linears``, those that share one together. Raises ``UnsupportedError`` for one without."""
    found: list[_Shared] = []
    of: dict[str, _Shared] = {}
    last: list[Tensor] = []  # held, so that no other input gets its place

    def place(name: str, x: Tensor) -> None:
        if not last or last[0] is not x:
            last[:] = [x]
            found.append(_Shared())
        of[name] = found[-1]
        found[-1].linears[name] = linears[name]

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in of:
                place(name, args[0])
            if next(iter(of[name].linears)) == name:
                of[name].add(args[0])

        return hook

    hooks = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        for call, x in zip(calls, hidden, strict=True):
            call.run(layer, x)
            progress(x.shape[1])
    finally:
        for hook in hooks:
            hook.remove()
    unused = sorted(linears.keys() - of.keys())
    if unused:
        raise UnsupportedError(f"the linear layer {unused[0]} is never called; there is no input to round it for")
    return found


def _round(shared: _Shared, prefix: str, bits: int, dtype: torch.dtype, shares: list[float]) -> dict[str, Tensor]:
    weight, metric = torch.cat([linear.weight for linear in shared.linears.values()]), shared.metric
    assert metric is not None
    if not (weight.isfinite().all() and metric.isfinite().all()):
        names = ", ".join(f"{prefix}.{name}" for name in shared.linears)
        raise ConfigError(f"the weights of {names}, or their inputs, are not all finite; they cannot be rounded")
    rounded = round_with_feedback(weight, metric, bits)
    values = rounded.values()
    plain = output_error(weight, nearest(weight, bits).values(), metric)
    shares.append(output_error(weight, values, metric) / plain if plain else 1.0)
    tensors: dict[str, Tensor] = {}
    first = 0
    for name, linear in shared.linears.items():
        last = first + linear.out_features
        tensors |= packed_tensors(f"{prefix}.{name}", rounded.rows(first, last), dtype)
        linear.weight.data = values[first:last]
        first = last
    return tensors
