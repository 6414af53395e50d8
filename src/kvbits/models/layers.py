"""The decoder layers of a model of transformers'."""

from __future__ import annotations

from torch import nn

from kvbits.errors import UnsupportedError


def layers_of(model: nn.Module, count: int, name: str) -> list[nn.Module]:
    """The list of modules whose ``i``-th holds the attention that calls itself layer ``i``.

    Raises ``UnsupportedError`` for a model without one.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(_is_layer, module, range(count))):
            return list(module)
    raise UnsupportedError(f"the model '{name}' keeps its {count} layers in no list; calibration goes layer by layer")


def _is_layer(layer: nn.Module, index: int) -> bool:
    return any(getattr(part, "layer_idx", None) == index for part in layer.modules())
