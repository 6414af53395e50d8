"""What a checkpoint of ``kvbits quantize`` says, by arithmetic on its words alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Every rounded weight by arithmetic on its words alone, ``float32``."""
    tensors, found = load_file(folder / "model.safetensors"), {}
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    bits = bits["weights"]["num_bits"]
    shifts = torch.arange(0, 32, bits)
    for stem in (name.removesuffix(".weight_packed") for name in tensors if name.endswith("weight_packed")):
        rows, columns = tensors[f"{stem}.weight_shape"].tolist()
        words, zeros = (tensors[f"{stem}.{leaf}"].long() for leaf in ("weight_packed", "weight_zero_point"))
        codes = (words.unsqueeze(2) >> shifts & (1 << bits) - 1).flatten(1)[:, :columns]
        bases = (zeros.unsqueeze(1) >> shifts.unsqueeze(1) & (1 << bits) - 1).flatten(0, 1)[:rows]
        steps = tensors[f"{stem}.weight_scale"].float().repeat_interleave(32, dim=1)
        found[f"{stem}.weight"] = (codes - bases.repeat_interleave(32, dim=1)).float() * steps
    return found


def with_values(folder: str, values: dict[str, Tensor]) -> Any:
    """transformers' model of ``folder`` in float32 with other weights."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in values.items():
            found.get_parameter(name).copy_(value)
    return found
