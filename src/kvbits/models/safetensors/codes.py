"""Weights in bits as checkpoints carry them, taken apart: codes, scales and zero points of any outputs.

A weight is ``scale * (code - zero)``. All three layouts put codes into words of 32 bits, the first in the lowest bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.safetensors.carried import Carried

_WORD = 32
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the code of each of its columns lies (AutoAWQ's ``gemm``)."""


@dataclass(frozen=True)
class Coded(ABC):
    """One weight ``[out, in]``; ``bits`` a code, ``scales`` and ``zeros`` ``[out, groups]`` (``zeros`` may be one
    number)."""

    name: str
    shape: tuple[int, int]
    bits: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | int

    @property
    def group(self) -> int:
        """Inputs that share a scale; the last group may have fewer."""
        return -(-self.shape[1] // self.scales.shape[1])

    @abstractmethod
    def codes(self, first: int, last: int) -> Tensor:
        """``uint8 [last - first, in]``; both are multiples of 32, or the end."""


@dataclass(frozen=True)
class _ByInputs(Coded):
    """Words along the inputs: ``int32 [out, words]``."""

    def codes(self, first: int, last: int) -> Tensor:
        return _split(self.words[first:last], self.bits)[:, : self.shape[1]]


@dataclass(frozen=True)
class _Gptq(Coded):
    """``int32 [words, out]``."""

    def codes(self, first: int, last: int) -> Tensor:
        return _split(self.words[:, first:last].T, self.bits)[:, : self.shape[1]]


@dataclass(frozen=True)
class _Awq(Coded):
    """Words along the outputs, eight in an order of their own: ``int32 [in, words]``."""

    def codes(self, first: int, last: int) -> Tensor:
        return _awq_columns(self.words[:, first // 8 : last // 8]).T


def read_coded(
    carried: Carried, stem: str, parts: Mapping[str, Tensor], shape: tuple[int, int], where: str
) -> Coded | None:
    """The weight of the layer ``stem`` of ``shape`` out of its tensors by their last names; ``None`` for a plain one.

    Raises ``ConfigError`` naming a tensor that is missing or of another shape, ``UnsupportedError`` for groups that are
    not runs of neighbouring inputs; ``where`` says in which files they lie.
    """
    leaf, make = _LAYOUTS[carried.layout]
    if leaf not in parts:
        return None
    try:
        return make(f"{stem}.{leaf}", parts, shape, carried.zero_offset)
    except KeyError as error:
        raise ConfigError(f"'{where}' has no tensor {stem}.{error.args[0]}, which goes with {stem}.{leaf}") from error


LEAVES = frozenset({
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "qweight", "qzeros", "scales",
    "g_idx",
})  # fmt: skip
"""Last names of the tensors that make a weight."""

CODES = frozenset({"weight_packed", "qweight"})
"""Those that no plain checkpoint has."""


def _compressed(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], _: int) -> Coded:
    words, scales = parts["weight_packed"], parts["weight_scale"]
    bits = _bits(name, words.shape[1], shape[1])
    found = tuple(int(length) for length in parts["weight_shape"].tolist()) if "weight_shape" in parts else shape
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    scales = scales.expand(shape[0], -1) if len(scales) == 1 else scales
    _expect(name, found == shape and len(words) == shape[0] and len(scales) == shape[0], found, shape)
    _check_order(name, parts.get("weight_g_idx"), shape[1], scales.shape[1])
    zeros: Tensor | int = 1 << (bits - 1)
    if "weight_zero_point" in parts:
        packed = parts["weight_zero_point"]
        zeros = _split(packed.T, bits).T[: shape[0]]
        _expect(f"{name.rpartition('.')[0]}.weight_zero_point", zeros.shape == scales.shape, zeros.shape, scales.shape)
    return _ByInputs(name, shape, bits, words, scales, zeros)


def _gptq(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], zero_offset: int) -> Coded:
    words, scales, packed = parts["qweight"], parts["scales"].T, parts["qzeros"]
    bits = _bits(name, len(words), shape[1])
    _expect(name, words.shape[1] == shape[0] == len(scales), (words.shape[1], shape[1]), shape)
    _check_order(name, parts.get("g_idx"), shape[1], scales.shape[1])
    zeros = _split(packed, bits).T[: shape[0]] + zero_offset
    _expect(f"{name.rpartition('.')[0]}.qzeros", zeros.shape == scales.shape, zeros.shape, scales.shape)
    return _Gptq(name, shape, bits, words, scales, zeros)


def _awq(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], _: int) -> Coded:
    words, scales, zeros = parts["qweight"], parts["scales"].T, _awq_columns(parts["qzeros"]).T
    _expect(name, (8 * words.shape[1], len(words)) == shape, (8 * words.shape[1], len(words)), shape)
    _expect(f"{name.rpartition('.')[0]}.qzeros", zeros.shape == scales.shape, zeros.shape, scales.shape)
    return _Awq(name, shape, 4, words, scales, zeros)


_Make = Callable[[str, Mapping[str, Tensor], tuple[int, int], int], Coded]
_LAYOUTS: dict[str, tuple[str, _Make]] = {
    "compressed-tensors": ("weight_packed", _compressed), "gptq": ("qweight", _gptq), "awq": ("qweight", _awq),
}  # fmt: skip


def _split(words: Tensor, bits: int) -> Tensor:
    """``int32 [..., words]`` to codes ``uint8 [..., words * 32 / bits]``; the machine is little endian."""
    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack([found & 15, found >> 4], dim=-1).flatten(-2)


def _awq_columns(words: Tensor) -> Tensor:
    """``int32 [rows, words]`` to ``uint8 [rows, 8 * words]``."""
    found: Tensor = _split(words, 4).unflatten(-1, (-1, 8))[..., _AWQ_PLACES].flatten(-2)
    return found


def _bits(name: str, words: int, inputs: int) -> int:
    for bits in (4, 8):
        if words == -(-inputs * bits // _WORD):
            return bits
    raise UnsupportedError(f"tensor {name} has {words} words for {inputs} inputs, neither 4 nor 8 bits each")


def _check_order(name: str, order: Tensor | None, inputs: int, groups: int) -> None:
    if order is not None and not torch.equal(order.long(), torch.arange(inputs) // -(-inputs // groups)):
        raise UnsupportedError(
            f"the groups of {name} are not runs of neighbouring inputs (desc_act, actorder: g_idx); take a checkpoint "
            "that was made without it"
        )


def _expect(name: str, fits: bool, found: object, wanted: object) -> None:
    if not fits:
        raise ConfigError(f"tensor {name} has the shape {_plain(found)}; the model has {_plain(wanted)}")


def _plain(shape: object) -> list[int]:
    return [int(length) for length in shape]  # type: ignore[attr-defined]
