"""The buffers of a model that was built without memory."""

from __future__ import annotations

from typing import Any

import torch


def fill_buffers(model: Any) -> None:
    """Give memory to the buffers that no file holds, and let the model set them as it does for a new model.

    To be called while the parameters have no memory, as a new model's buffers and weights are set together.
    """
    for module in model.modules():
        found = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in found.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if found:
            with torch.no_grad():
                model._init_weights(module)
