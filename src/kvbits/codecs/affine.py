"""Uniform integer codes, ``x = scale * code + zero``, with one scale per token or per channel of a page and head.

Keys per channel and values per token follow KIVI (Liu et al., 2024, arXiv:2402.02750): key outliers sit in fixed
channels. With 64-token pages a channel's group is the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side, pack_side, unpack_side
from kvbits.codecs.packing import packed_bytes, quads_multiple
from kvbits.config import PAGE_TOKENS, align

CLIPPED_BITS = 3
"""Codecs of up to so many bits have their range fitted; finer ones lose more by saturation than they gain."""


@dataclass(frozen=True)
class Affine(Codec):
    """Affine codes of ``bits`` bits; parameters are float16.

    ``per`` names the axis that has its own scale: each of the page's 64 tokens, or each channel. Symmetric codes have
    no zero point: code ``c`` in ``[-(2**(b-1)-1), 2**(b-1)-1]`` is stored as ``c + 2**(b-1)`` for keys (the unsigned
    operand of the kernel's dot product) and as two's complement for values (the signed operand). Asymmetric codes run
    from 0 to ``2**b - 1`` with ``zero = min``.

    Page bytes: codes (:func:`kvbits.codecs.packing.pack`), scales ``float16 [n]``, zeros ``float16 [n]`` unless
    symmetric, where ``n`` is 64 or ``dim``.
    """

    bits: int = 8
    per: Literal["token", "channel"] = "token"
    symmetric: bool = False

    def _params(self, dim: int) -> int:
        return PAGE_TOKENS if self.per == "token" else dim

    def page_bytes(self, dim: int) -> int:
        return align(packed_bytes(dim, self.bits) + self._params(dim) * (2 if self.symmetric else 4))

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        axis = -1 if self.per == "token" else -2
        codes, scale, zero = affine_codes(rows, axis, self.bits, self.symmetric, rounding, lambda x: to_half(x).float())
        half = 2 ** (self.bits - 1)
        offset = half if self.symmetric and side == "key" else 0
        codes = (codes.to(torch.int32) + offset) & (2 * half - 1)
        params = [to_half(scale)] if self.symmetric else [to_half(scale), to_half(zero)]
        return self._page([pack_side(codes.to(torch.uint8), self.bits, side), *params], rows.shape[-1])

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        axis = -1 if self.per == "token" else -2
        n = self._params(dim)
        size = packed_bytes(dim, self.bits)
        codes = unpack_side(page, self.bits, dim, side)
        params = page[..., size : size + n * (2 if self.symmetric else 4)].contiguous().view(torch.float16).float()
        scale = params[..., :n].unsqueeze(axis)
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            signed: Tensor = codes.float() - half if side == "key" else (codes.float() + half) % (2 * half) - half
            return signed * scale
        return codes.float() * scale + params[..., n:].unsqueeze(axis)

    @property
    def dim_multiple(self) -> int:
        return max(16, quads_multiple(self.bits))

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        return PageFormat("affine", self.bits, packed_bytes(dim, self.bits), self.per, self.symmetric)

    @property
    def fits_range(self) -> bool:
        return not self.symmetric and self.bits <= CLIPPED_BITS

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["affine"] + self.bits + 16 * (self.per == "channel") + 32 * self.symmetric


def affine_codes(
    rows: Tensor,
    axis: int,
    bits: int,
    symmetric: bool,
    rounding: Rounding | None,
    stored_scale: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``rows`` ``float32 [..., 64, dim]``, with one scale and zero along ``axis``; all float32.

    Symmetric codes are signed, their zeros 0; asymmetric ones begin at 0. ``stored_scale`` rounds a scale to what a
    page can hold; zeros are float16. ``x`` is about ``scale * code + zero``.
    """
    rounding = rounding or Rounding()
    rows, broken = numbers_of(rows, axis)
    if symmetric:
        limit = 2 ** (bits - 1) - 1
        scale = stored_scale(rows.abs().amax(axis) / limit)
        zero = torch.zeros_like(scale)
        codes = choose_codes(rows, scale, zero, axis, _nearest(-limit, limit), _itself, rounding)
        return codes, scale.masked_fill(broken, torch.nan), zero
    top = 2**bits - 1
    low, high = rows.amin(axis), rows.amax(axis)
    if rounding.clip is not None:
        low, high = _clipped(low, high, rounding.clip)
    zero = to_half(low).float()
    scale = stored_scale((high - zero).clamp_min(0.0) / top)  # a saturated least may be the larger
    codes = choose_codes(rows, scale, zero, axis, _nearest(0, top), _itself, rounding)
    return codes, scale.masked_fill(broken, torch.nan), zero


def numbers_of(rows: Tensor, axis: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``rows`` with 0 for NaN and infinities, and which groups along ``axis`` had any of them.

    The scales of those groups are stored as NaN, so that whoever reads the page notices.
    """
    finite = rows.isfinite()
    return rows.where(finite, 0.0), ~finite.all(axis)


def _clipped(low: Tensor, high: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Range ends ``[..., kv_heads, n]`` moved towards their middle; exactly kept where ``clip`` is 1."""
    share = clip.unsqueeze(-1)
    middle, reach = (low + high) * 0.5, (high - low) * 0.5 * share
    return torch.where(share == 1, low, middle - reach), torch.where(share == 1, high, middle + reach)


def _nearest(least: int, most: int) -> Callable[[Tensor], Tensor]:
    # NaN, where feedback overflows, is the least
    return lambda x: torch.round(x).nan_to_num(least, most, least).clamp(least, most)


def _itself(code: Tensor) -> Tensor:
    return code


def choose_codes(
    rows: Tensor,
    scale: Tensor,
    zero: Tensor,
    axis: int,
    nearest: Callable[[Tensor], Tensor],
    meaning: Callable[[Tensor], Tensor],
    rounding: Rounding,
) -> Tensor:
    """The code of every element, as float32: ``nearest(x)`` for a number in units of its scale; ``meaning`` undoes it.

    The order of operations is the kernels': the bytes must agree.
    """
    inverse = _reciprocal(scale).unsqueeze(axis).expand_as(rows)
    scale, zero = (x.unsqueeze(axis).expand_as(rows) for x in (scale, zero))
    feedback = rounding.feedback
    if feedback is None:
        return nearest((rows - zero) * inverse)
    if rounding.order is not None:
        order = rounding.order.long().unsqueeze(-2).expand_as(rows)
        rows, scale, zero, inverse = (x.gather(-1, order) for x in (rows, scale, zero, inverse))
    rest, codes = rows.clone(), torch.empty_like(rows)
    for c in range(rows.shape[-1]):
        codes[..., c] = nearest((rest[..., c] - zero[..., c]) * inverse[..., c])
        error = rest[..., c] - (meaning(codes[..., c]) * scale[..., c] + zero[..., c])
        rest[..., c + 1 :] -= error.unsqueeze(-1) * feedback[:, None, c, c + 1 :]
    return codes if rounding.order is None else torch.empty_like(codes).scatter_(-1, order, codes)


def to_half(x: Tensor) -> Tensor:
    """Round to float16; what is beyond its range becomes its largest number, so that codes saturate and stay finite.

    Zero has no sign, so that bytes do not tell how it came about.
    """
    half = x.clamp(-65504.0, 65504.0).half()
    return half.masked_fill(half == 0, 0.0)


def _reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale`` in float32, 0 where the scale rounded to 0 (the page is constant there)."""
    return torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
