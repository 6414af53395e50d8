"""Prompts by torch's FlashAttention: what lies before a query's own page, decoded once a layer and step.

A page that a chunk's queries share is decoded once into a scratch of at most :data:`SCRATCH_BYTES`; more of a context
than that goes piece by piece. Pages before the chunk are seen by all its queries. Inside the chunk the second half of
the pages sees the first, then the same within each half, down to single pages: no call needs a mask. Results are merged
by their log-sum-exp (Dao et al. 2022, FlashAttention); the queries' own pages follow in ``prefill_tiles``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.triton.launch import Launch, LayerKernels, unpack
from kvbits.kernels.triton.tables import StepTables

SCRATCH_BYTES = 128 << 20
"""Most that decoded pages before a chunk take: 32,768 tokens of 8 KV heads of 128."""


@dataclass(frozen=True)
class Before:
    """Attention of a step's rows to the pages before their own.

    ``mean`` ``float32 [..., dim]``: the weighted means; ``lse`` ``float32 [...]``: natural logarithms of the weights'
    sums, -inf where nothing was seen.
    """

    mean: Tensor
    lse: Tensor

    def merge(self, mean: Tensor, lse: Tensor) -> None:
        """Take in another part, of the same shapes."""
        both = torch.logaddexp(self.lse, lse)
        self.mean.mul_((self.lse - both).exp_().unsqueeze(-1)).add_(mean * (lse - both).exp_().unsqueeze(-1))
        self.lse.copy_(both)


def refusal(layer: LayerGeometry, device: torch.device, dtype: torch.dtype) -> str | None:
    """``None``, or why the prompts of ``layer`` stay with Triton's kernels."""
    if layer.window is not None:
        return "windows"
    if layer.softcap is not None:
        return "soft caps"
    if layer.key_dim != layer.value_dim or layer.key_dim % 8:
        return f"head sizes {layer.key_dim} and {layer.value_dim}"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return f"no FlashAttention on '{device.type}'"
    if dtype != torch.bfloat16:
        return "float32 rows"
    capable = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return None if capable else "FlashAttention needs compute capability 8.0"


def line(layers: Sequence[LayerGeometry], device: torch.device) -> str:
    """Whose kernels compute prompts of bfloat16 rows, for users to read."""
    reasons = Counter(refusal(layer, device, torch.bfloat16) for layer in layers)
    parts = [f"FlashAttention for {reasons.pop(None)} layers"] if None in reasons else []
    return ", ".join([*parts, *(f"Triton's kernels for {count} ({reason})" for reason, count in reasons.items())])


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention without a mask, ``[batch, heads, length, dim]``; its mean, and its log-sum-exp in float32."""
    if query.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        op = torch.ops.aten._scaled_dot_product_flash_attention
    mean, lse = op(query, key, value, 0.0, False, scale=scale)[:2]
    return mean, lse


def before_own_page(
    launch: Launch, layer: LayerKernels, tables: StepTables, batch: BatchLayout, sequences: list[int], query: Tensor
) -> Before:
    """``[rows, heads]``, for the rows of ``sequences``; the pages that the step fills are sealed already."""
    geometry = layer.view.geometry
    heads, group, dim = geometry.num_kv_heads, geometry.group_size, geometry.key_dim
    mean = torch.zeros(batch.num_rows, heads * group, dim, device=query.device)
    lse = torch.full(mean.shape[:2], -torch.inf, device=query.device)
    for s in sequences:
        start, count, row = int(batch.starts[s]), int(batch.counts[s]), int(batch.rows[s])
        first, end = start // PAGE_TOKENS, -(-(start + count) // PAGE_TOKENS)
        if end == 1:
            continue
        # rows of whole pages; those before `start` and after the last are no one's
        skip, rows = start - first * PAGE_TOKENS, (end - first) * PAGE_TOKENS
        folded = query.new_zeros(heads, rows, group, dim)
        folded[:, skip : skip + count] = query[row : row + count].unflatten(1, (heads, group)).transpose(0, 1)
        folded = folded.flatten(1, 2)
        found = Before(torch.zeros_like(folded, dtype=torch.float32), lse.new_full(folded.shape[:2], -torch.inf))
        own = slice(skip * group, (skip + count) * group)
        for low, high in _pieces(first, geometry):
            keys, values = _unpacked(launch, layer, tables, s, low, high, query.dtype)
            part, its = flash(folded[None, :, own], keys[None], values[None], geometry.scale)
            Before(found.mean[:, own], found.lse[:, own]).merge(part[0], its[0])
        if end - first > 1:
            keys, values = _unpacked(launch, layer, tables, s, first, end - 1, query.dtype)
            _inside(found, folded, keys, values, group, geometry.scale)
        mean[row : row + count] = found.mean[:, own].unflatten(1, (count, group)).transpose(0, 1).flatten(1, 2)
        lse[row : row + count] = found.lse[:, own].unflatten(1, (count, group)).transpose(0, 1).flatten(1, 2)
    return Before(mean, lse)


def _pieces(pages: int, layer: LayerGeometry) -> Iterator[tuple[int, int]]:
    size = PAGE_TOKENS * layer.num_kv_heads * (layer.key_dim + layer.value_dim) * 2
    most = max(SCRATCH_BYTES // size, 1)
    for low in range(0, pages, most):
        yield low, min(low + most, pages)


def _unpacked(
    launch: Launch, layer: LayerKernels, tables: StepTables, sequence: int, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    geometry, tokens = layer.view.geometry, (high - low) * PAGE_TOKENS
    keys, values = (
        torch.empty(geometry.num_kv_heads, tokens, dim, dtype=dtype, device=tables.starts.device)
        for dim in (geometry.key_dim, geometry.value_dim)
    )
    unpack(launch, layer, tables, sequence, low, keys, values)
    return keys, values


def _inside(found: Before, query: Tensor, keys: Tensor, values: Tensor, group: int, scale: float) -> None:
    """Pages of the chunk that see earlier ones of it; ``keys``, ``values``: all its pages but the last."""
    pages = query.shape[1] // (PAGE_TOKENS * group)
    half = 1 << ((pages - 1).bit_length() - 1)
    while half:
        whole = pages // (2 * half)
        _second_halves(found, query, keys, values, group, scale, half, 0, whole, half)
        rest = pages - whole * 2 * half - half
        if rest > 0:
            _second_halves(found, query, keys, values, group, scale, half, whole, 1, rest)
        half //= 2


def _second_halves(
    found: Before, query: Tensor, keys: Tensor, values: Tensor, group: int, scale: float, half: int, pair: int,
    pairs: int, length: int,
) -> None:  # fmt: skip
    """Of ``pairs`` pairs of ``half`` pages from ``pair`` on: ``length`` pages of the second see all of the first."""
    if not pairs:
        return

    def second(x: Tensor) -> Tensor:
        return _runs(x, PAGE_TOKENS * group * half, 2 * pair + 1, pairs, PAGE_TOKENS * group * length)

    first_keys, first_values = (
        _runs(x, PAGE_TOKENS * half, 2 * pair, pairs, PAGE_TOKENS * half) for x in (keys, values)
    )
    mean, lse = flash(second(query), first_keys, first_values, scale)
    Before(second(found.mean), second(found.lse)).merge(mean, lse)


def _runs(x: Tensor, size: int, first: int, count: int, length: int) -> Tensor:
    """Every second run of ``size`` rows of ``x`` ``[heads, rows, ...]`` from the run ``first`` on, ``length`` rows of
    each, as a view ``[count, heads, length, ...]``."""
    strides = x.stride()
    shape = count, x.shape[0], length, *x.shape[2:]
    offset = x.storage_offset() + first * size * strides[1]
    return x.as_strided(shape, (2 * size * strides[1], *strides), offset)
