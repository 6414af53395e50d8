"""Linear layers with their weights in the order in which kvbits' kernels read them.

A decode step multiplies a few rows with every weight, so it must read each of them once, in order, and do little else;
and a row's result must not depend on the rows beside it, which libraries do not promise.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from kvbits.kernels.decoder import PackedWeight, Products

_TRIED_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 127, 200, 512)


class PackedLinear(nn.Module):
    """``nn.Linear`` in bfloat16 for inference; ``x`` is ``bfloat16 [..., in]``, the result ``[..., out]``."""

    def __init__(self, linear: nn.Linear, products: Products, weight_format: str = "bf16") -> None:
        super().__init__()
        self.weight: PackedWeight = products.pack(linear.weight, linear.bias, weight_format)
        self._products = products

    def forward(self, x: Tensor) -> Tensor:
        return self._products.apply(self.weight, x)


def pack_linears(model: nn.Module, weight_format: str = "bf16") -> int:
    """Replace the bfloat16 linear layers of ``model`` on the CPU; returns how many were.

    ``weight_format`` is that of the packed weights (:data:`kvbits.config.WEIGHT_FORMATS`). Layers of another
    type (subclasses, quantized ones) and other dtypes stay as they are, as do all where the processor has only our
    portable kernels, which are slower than torch's (unless another format is asked for).
    """
    products = Products()
    if products.name == "scalar" and weight_format == "bf16":
        return 0
    replaced = 0
    for parent in [module for module in model.modules() if not _packs(module)]:  # a packed layer's weight goes at once
        for name, child in list(parent.named_children()):
            if _packs(child):
                setattr(parent, name, PackedLinear(child, products, weight_format))
                replaced += 1
    return replaced


def _packs(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(layer) is nn.Linear
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.device.type == "cpu"
        and layer.in_features % 2 == 0
    )


def depends_on_rows(model: nn.Module) -> str | None:
    """``None`` when every linear layer gives a row the same bits for any number of rows; else the layer that fails.

    Each shape of layer is tried once, on random rows.
    """
    tried = set()
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            return f"the linear layer '{name}' is not packed"
        if not isinstance(layer, PackedLinear):
            continue
        shape = (layer.weight.out_features, layer.weight.in_features)
        if shape in tried:
            continue
        tried.add(shape)
        x = torch.randn(_TRIED_ROWS[-1], shape[1], generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            whole = layer(x)
            for rows in _TRIED_ROWS:
                if not torch.equal(layer(x[:rows]), whole[:rows]):
                    return f"the linear layer '{name}' rounds differently for {rows} and {len(x)} rows"
    return None
