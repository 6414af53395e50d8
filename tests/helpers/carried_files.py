"""Checkpoints with weights in bits, packed word by word as the tools that write them do.

Layouts: compressed-tensors (``pack_quantized``), GPTQModel (``dequantize_weights``) and AutoAWQ (``WQLinear_GEMM``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.tiny import save

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Form:
    """``pack`` makes a layer's tensors, by their last names, of codes, scales and zero points; ``config`` is the
    ``quantization_config``."""

    pack: Callable[[Form, Tensor, Tensor, Tensor], dict[str, Tensor]]
    config: dict[str, Any]
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    zero_offset: int = 0
    scales: torch.dtype = torch.float16


def rounded(weight: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, scales and zero points ``[out, groups]``."""
    size = form.group if form.group > 0 else weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    most = (1 << form.bits) - 1
    if form.symmetric:
        scales = (2 * groups.abs().amax(dim=2) / most).to(form.scales)
        zeros = torch.full(scales.shape, 1 << (form.bits - 1))
    else:
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scales = ((high - low) / most).to(form.scales)
        zeros = (-low / scales.float()).round().clamp(1, most).int()
    codes = (groups / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, most)
    return codes.flatten(1).int(), scales, zeros.int()


def values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What they mean, ``float32 [out, in]``."""
    size = codes.shape[1] // scales.shape[1]
    wide = (codes.unflatten(1, (-1, size)) - zeros.unsqueeze(2)).float() * scales.float().unsqueeze(2)
    return wide.flatten(1)


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the last dimension, the first code in the lowest bits; ``order``: which code of a word comes next."""
    count = 32 // bits
    found = torch.zeros(*codes.shape[:-1], codes.shape[-1] // count, dtype=torch.int64)
    for place, i in enumerate(order or range(count)):
        found |= codes[..., i::count].long() << (bits * place)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def compressed(form: Form, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    parts = {
        "weight_packed": words(codes, form.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not form.symmetric:
        parts["weight_zero_point"] = words(zeros.T, form.bits).T
    return parts


def gptq(form: Form, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    size = codes.shape[1] // scales.shape[1]
    return {
        "qweight": words(codes, form.bits).T,
        "qzeros": words(zeros.T - form.zero_offset, form.bits),
        "scales": scales.T,
        "g_idx": (torch.arange(codes.shape[1]) // size).int(),
    }


def awq(form: Form, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    return {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T,
    }


def of_compressed(bits: int, symmetric: bool, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


def write(model: nn.Module, directory: Path, form: Form) -> dict[str, Tensor]:
    """Write ``model`` with its layers' linear weights in ``form``; returns what these weights then are."""
    save(model.half() if form.scales == torch.float16 else model.to(form.scales), directory)
    model.float()
    file = directory / "model.safetensors"
    tensors, meant = load_file(file), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes = rounded(module.weight.detach(), form)
            meant[f"{name}.weight"] = values(*codes)
            del tensors[f"{name}.weight"]
            parts = form.pack(form, *codes).items()
            tensors |= {f"{name}.{leaf}": part.contiguous() for leaf, part in parts}
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(directory, quantization_config=form.config)
    return meant


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
