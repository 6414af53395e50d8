"""The quantization that a checkpoint carries, by its configuration: torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from kvbits.errors import UnsupportedError

_BITS = (4, 8)
_UNPACKED_BY_TRANSFORMERS = ("mxfp4",)


@dataclass(frozen=True)
class Carried:
    """``layout``: ``"compressed-tensors"`` (pack-quantized), ``"gptq"`` or ``"awq"`` (gemm).

    ``zero_offset`` is added to stored zero points: the first format of GPTQ stores one less.
    """

    layout: str
    zero_offset: int = 0


def carried_by(name: str, config: Mapping[str, Any]) -> Carried | None:
    """What the model ``name`` of this configuration carries; ``None`` for plain weights.

    Raises ``UnsupportedError`` naming a quantization that kvbits does not read, and what to use instead.
    """
    fields = config.get("quantization_config") or config.get("compression_config")
    if not fields:
        return None
    if not isinstance(fields, Mapping):
        _refuse(name, "a quantization_config that is no mapping")
    method = str(fields.get("quant_method", "")).lower()
    if method in _UNPACKED_BY_TRANSFORMERS or fields.get("config_groups") == {}:  # none: scales of a cache alone
        return None
    reader = {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}.get(method)
    if reader is None:
        _refuse(name, f"{method or 'unnamed'} weights")
    return reader(name, fields)


def _compressed(name: str, fields: Mapping[str, Any]) -> Carried | None:
    layout = fields.get("format")
    if layout == "dense":
        return None
    sparse = (fields.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        _refuse(name, f"compressed-tensors weights of the sparse format {sparse}")
    groups = fields.get("config_groups") or {}
    for group in groups.values():
        own = group.get("format") or layout
        weights = group.get("weights") or {}
        if own != "pack-quantized":
            _refuse(name, f"compressed-tensors weights of the format {own}")
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in _BITS:
            _refuse(name, f"compressed-tensors weights of {weights.get('num_bits')} bits ({weights.get('type')})")
        if group.get("input_activations"):
            _refuse(name, "compressed-tensors weights whose inputs are quantized too")
    return Carried("compressed-tensors")


def _gptq(name: str, fields: Mapping[str, Any]) -> Carried:
    if fields.get("bits") not in _BITS:
        _refuse(name, f"GPTQ weights of {fields.get('bits')} bits")
    layout = str(fields.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        _refuse(name, f"GPTQ weights of the format {layout}")
    return Carried("gptq", 1 if layout == "gptq" else 0)


def _awq(name: str, fields: Mapping[str, Any]) -> Carried:
    bits = fields.get("bits", fields.get("w_bit"))
    if bits != 4:
        _refuse(name, f"AWQ weights of {bits} bits")
    version = str(fields.get("version", fields.get("format", "gemm"))).lower()
    if version != "gemm":
        _refuse(name, f"AWQ weights of the version {version}")
    return Carried("awq")


def _refuse(name: str, what: str) -> NoReturn:
    raise UnsupportedError(
        f"the model '{name}' carries {what}; kvbits reads compressed-tensors (pack-quantized), GPTQ (4 or 8 bits), AWQ "
        "(gemm) and GGUF: take one of these, or the 16-bit checkpoint with --weights int8 or int4"
    )
