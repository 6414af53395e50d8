"""Linear layers with their weights in oneDNN's blocked order.

A decode step multiplies a few rows with every weight, and oneDNN reorders a plain weight anew in each call: for the 30
layers of SmolLM2 and 8 rows that is half of the time. The reordering is done once, at load time, by the operators that
``torch.compile`` uses for the same purpose; nothing else about the model changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 8
"""Rows for which oneDNN chooses the order: a small batch; with hundreds of rows the order makes no difference."""


class PackedLinear(nn.Module):
    """``nn.Linear`` in bfloat16 for inference; ``x`` is ``bfloat16 [..., in]``, the result ``[..., out]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
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
