"""A Hugging Face checkpoint with the scales of an FP8 cache in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from kvbits.errors import ConfigError
from kvbits.export.scales import Granularity, LayerScales
from kvbits.files import write_bytes, write_text

Layout = Literal["compressed-tensors", "modelopt"]

SCALES_FILE = "model-kv-cache-scales.safetensors"
SGLANG_FILE = "sglang-kv-scales.json"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_FIRST = "model-00001-of-00002.safetensors"


def scale_tensors(layers: Sequence[LayerScales], modules: Sequence[str], layout: Layout) -> dict[str, Tensor]:
    """The scales under the names and in the shapes that ``layout`` wants; ``modules`` names each layer's attention.

    ``compressed-tensors``: ``{module}.k_scale``, ``[1]`` or, per head, ``[kv_heads, 1, 1]``. ``modelopt``:
    ``{module}.k_proj.k_scale``, a scalar.
    """
    found: dict[str, Tensor] = {}
    for module, layer in zip(modules, layers, strict=True):
        for letter, scale in (("k", layer.key), ("v", layer.value)):
            if layout == "modelopt":
                found[f"{module}.{letter}_proj.{letter}_scale"] = scale.reshape(())
            else:
                found[f"{module}.{letter}_scale"] = scale if scale.numel() == 1 else scale.view(-1, 1, 1)
    return {name: tensor.float().contiguous().clone() for name, tensor in found.items()}


def quantization_config(layout: Layout, granularity: Granularity) -> dict[str, Any]:
    """What ``config.json`` gets as ``quantization_config``."""
    if layout == "modelopt":
        return {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": _modelopt_scheme(), **_nothing()}
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "attn_head" if granularity == "head" else "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    }


def hf_quant_config(version: str) -> dict[str, Any]:
    """ModelOpt's ``hf_quant_config.json``, which TensorRT-LLM reads: weights as they are, the cache in FP8."""
    return {
        "producer": {"name": "kvbits", "version": version},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8", **_nothing()},
    }


def sglang_scales(layers: Sequence[LayerScales]) -> dict[str, Any]:
    """SGLang's ``--quantization-param-path``: one factor a layer, for keys and values alike, for one rank."""
    factors = {str(index): float(max(s.key.max(), s.value.max())) for index, s in enumerate(layers)}
    return {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": factors}}}


def add_scales(
    directory: Path,
    layers: Sequence[LayerScales],
    modules: Sequence[str],
    layout: Layout,
    granularity: Granularity,
    version: str,
    report: Mapping[str, Any],
) -> None:
    """Add the scales to the checkpoint in ``directory``: a shard of their own, the index, the configuration.

    ``report`` is kept beside them as ``kvbits-export.json``. Raises ``ConfigError`` when the directory holds no
    safetensors checkpoint or cannot be written.
    """
    tensors = scale_tensors(layers, modules, layout)
    try:
        index = _index(directory)
        write_bytes(directory / SCALES_FILE, save(tensors, metadata={"format": "pt"}))
        index["weight_map"].update(dict.fromkeys(tensors, SCALES_FILE))
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        size = index.setdefault("metadata", {})
        size["total_size"] = size.get("total_size", 0) + total
        _write(directory / _INDEX, index)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = quantization_config(layout, granularity)
        _write(directory / "config.json", config)
        if layout == "modelopt":
            _write(directory / "hf_quant_config.json", hf_quant_config(version))
        elif granularity == "tensor":
            _write(directory / SGLANG_FILE, sglang_scales(layers))
        _write(directory / "kvbits-export.json", report)
    except OSError as error:
        raise ConfigError(f"cannot write the checkpoint '{directory}': {error.strerror or error}") from error


def _index(directory: Path) -> dict[str, Any]:
    """The checkpoint's index; made for one of a single file, which is renamed: beside ``model.safetensors`` readers
    look for no index."""
    path = directory / _INDEX
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    whole = directory / _WHOLE
    if not whole.is_file():
        raise ConfigError(f"'{directory}' holds neither {_INDEX} nor {_WHOLE}")
    with whole.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = [name for name in header if name != "__metadata__"]
    size = sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names)
    whole.rename(directory / _FIRST)
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, _FIRST)}


def _modelopt_scheme() -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "dynamic": False}


def _nothing() -> dict[str, Any]:
    return {"exclude_modules": ["lm_head"]}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2) + "\n")
