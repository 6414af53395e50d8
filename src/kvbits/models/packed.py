"""Linear layers with their weights in oneDNN's blocked order.

A decode step multiplies a few rows with every weight, and oneDNN reorders a plain weight anew in each call: for the 30
layers of SmolLM2 and 8 rows that is half of the time. The reordering is done once, at load time, by the operators that
``torch.compile`` uses for the same purpose; nothing else about the model changes.

With packed weights a row's result does not depend on the rows beside it, except that oneDNN has a path of its own for
a single row, which splits the sum; hence one row is computed as two. :func:`depends_on_rows` looks whether that holds
here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 8
"""Rows for which oneDNN chooses the order: a small batch; with hundreds of rows the order makes no difference."""

_TRIED_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 127, 200, 512)


class PackedLinear(nn.Module):
    """``nn.Linear`` in bfloat16 for inference; ``x`` is ``bfloat16 [..., in]``, the result ``[..., out]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if rows == 1:
            return self._multiply(x.reshape(1, -1).expand(2, -1).contiguous())[:1].reshape(*x.shape[:-1], -1)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def pack_linears(model: nn.Module) -> int:
    """Replace the bfloat16 linear layers of ``model`` on the CPU; returns how many were.

    Layers of another type (subclasses, quantized ones) and other dtypes stay as they are, as does everything where
    torch was built without oneDNN or the processor has no use for it in bfloat16.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                with torch.no_grad():
                    setattr(parent, name, PackedLinear(child))
                replaced += 1
    return replaced


def depends_on_rows(model: nn.Module) -> str | None:
    """``None`` when every linear layer gives a row the same bits for any number of rows; else the layer that fails.

    Each shape of layer is tried once, on random rows, for row counts around oneDNN's tile sizes.
    """
    tried = set()
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            return f"the linear layer '{name}' is not packed"
        if not isinstance(layer, PackedLinear) or (layer.in_features, layer.out_features) in tried:
            continue
        tried.add((layer.in_features, layer.out_features))
        x = torch.randn(_TRIED_ROWS[-1], layer.in_features, generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            whole = layer(x)
            for rows in _TRIED_ROWS:
                if not torch.equal(layer(x[:rows]), whole[:rows]):
                    return f"the linear layer '{name}' rounds differently for {rows} and {len(x)} rows"
    return None
