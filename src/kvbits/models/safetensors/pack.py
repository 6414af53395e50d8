"""Rounded weights as compressed-tensors writes them (``pack-quantized``), and files of tensors with their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvbits.files import replacing, write_text
from kvbits.models.safetensors.file import INDEX, SINGLE
from kvbits.weights.base import GROUP
from kvbits.weights.integers import Integers

SHARD = 1 << 30
"""Bytes of a file after which another begins; as many are in memory while it is written."""


def packed_tensors(stem: str, weight: Integers, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the layer ``stem``; scales in ``dtype``, bfloat16 or wider."""
    zeros = torch.nn.functional.pad(weight.zeros.T, (0, -weight.zeros.shape[0] % (32 // weight.bits)))
    return {
        f"{stem}.weight_packed": _words(weight.codes, weight.bits),
        f"{stem}.weight_scale": weight.scales.to(dtype),
        f"{stem}.weight_zero_point": _words(zeros.contiguous(), weight.bits).T.contiguous(),
        f"{stem}.weight_shape": torch.tensor(weight.codes.shape),
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """``uint8 [rows, n]`` into words of 32 bits, the first code in the lowest bits; the machine is little endian."""
    return (codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)


def quantization_config(bits: int, ignore: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` says of such weights; ``ignore`` are the linear layers that are not rounded."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(ignore), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def write_shards(directory: Path, parts: Iterable[tuple[int, Mapping[str, Tensor]]]) -> None:
    """Write ``parts`` (bytes, and tensors that are read when they are asked for) as a model's files.

    Raises ``ConfigError`` where one cannot be written.
    """
    shards: list[tuple[int, list[Mapping[str, Tensor]]]] = []
    for size, tensors in parts:
        if not shards or shards[-1][0] + size > SHARD:
            shards.append((0, []))
        shards[-1] = (shards[-1][0] + size, [*shards[-1][1], tensors])
    where: dict[str, str] = {}
    for number, (_, some) in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: part[key] for part in some for key in part}
        with replacing(directory / name) as place:
            save_file(tensors, place, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(size for size, _ in shards)
        write_text(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
