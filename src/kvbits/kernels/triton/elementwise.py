"""What lies between a layer's products and its attention: residual sums with norms, rotary embedding, gates.

Rows are ``bfloat16`` or ``float32``, contiguous; the arithmetic is in ``float32``, and every result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbits.kernels.triton.launch import Launch
from kvbits.kernels.triton.numbers import convert

_HEADS, _GATES = 8, 1024
"""Heads and gates that a program takes."""


@triton.jit
def _load(pointer, mask):
    return convert(tl.load(pointer, mask=mask, other=0.0), tl.float32)


@triton.jit
def _store(pointer, x, mask):
    tl.store(pointer, convert(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scale(squares, size, eps):
    return 1.0 / tl.sqrt(squares / size + eps)


@triton.jit
def add_norm_rows(x, delta, after, before, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid ``(rows,)``: see :func:`add_norm`; what is ``None`` is not done."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    total = _load(x + row + channel, inside)
    if delta is not None:
        added = _load(delta + row + channel, inside)
        if after is not None:
            added *= _scale(tl.sum(added * added, 0), WIDTH, eps) * tl.load(after + channel, mask=inside, other=0.0)
        rounded = convert(total + added, x.dtype.element_ty)
        tl.store(x + row + channel, rounded, mask=inside)
        total = convert(rounded, tl.float32)
    if before is not None:
        total *= _scale(tl.sum(total * total, 0), WIDTH, eps) * tl.load(before + channel, mask=inside, other=0.0)
        _store(out + row + channel, total, inside)


@triton.jit
def _turn(
    source, norm, cos, sin, out, first, head, heads, eps,
    DIM: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Heads from ``head`` on, of ``heads`` that begin with the row's ``first``."""
    HALF: tl.constexpr = TURNED // 2
    REST: tl.constexpr = DIM - TURNED
    head = head + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, HALF_BLOCK)[None, :]
    behind = TURNED + tl.arange(0, REST_BLOCK)[None, :]
    inside = (head < heads) & (channel < HALF)
    beyond = (head < heads) & (behind < DIM)
    at = (first + head) * DIM
    low, high = _load(source + at + channel, inside), _load(source + at + HALF + channel, inside)
    rest = _load(source + at + behind, beyond) if REST > 0 else low
    if norm is not None:
        squares = tl.sum(low * low + high * high, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        if WHOLE:
            scale = _scale(tl.sum(squares, 0), heads * DIM, eps)
            weights = norm + head * DIM
        else:
            scale = _scale(squares, DIM, eps)[:, None]
            weights = norm + head * 0
        low *= scale * tl.load(weights + channel, mask=inside, other=0.0)
        high *= scale * tl.load(weights + HALF + channel, mask=inside, other=0.0)
        if REST > 0:
            rest *= scale * tl.load(weights + behind, mask=beyond, other=0.0)
    angle = channel < HALF
    # the two halves of a table are alike in most models, but need not be
    turned_low = low * _load(cos + channel, angle) - high * _load(sin + channel, angle)
    turned_high = high * _load(cos + HALF + channel, angle) + low * _load(sin + HALF + channel, angle)
    _store(out + at + channel, turned_low, inside)
    _store(out + at + HALF + channel, turned_high, inside)
    if REST > 0:
        _store(out + at + behind, rest, beyond)


@triton.jit
def turn_heads(
    source, query_norm, key_norm, cos, sin, out, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid ``(rows, blocks of query heads + blocks of key heads)``, ``BLOCK`` heads each: see :func:`turned`.

    ``source`` is the row's queries, keys and values, ``out`` its queries and keys. ``WHOLE``: a norm is over all heads,
    which are one block then.
    """
    BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source += row * ((HEADS + 2 * KV_HEADS) * DIM)
    out += row * ((HEADS + KV_HEADS) * DIM)
    cos += row * TURNED
    sin += row * TURNED
    if block < BLOCKS:
        _turn(
            source, query_norm, cos, sin, out, 0, block * BLOCK, HEADS, eps,
            DIM, TURNED, BLOCK, HALF_BLOCK, REST_BLOCK, WHOLE,
        )  # fmt: skip
    else:
        _turn(
            source, key_norm, cos, sin, out, HEADS, (block - BLOCKS) * BLOCK, KV_HEADS, eps,
            DIM, TURNED, BLOCK, HALF_BLOCK, REST_BLOCK, WHOLE,
        )  # fmt: skip


@triton.jit
def gate_rows(source, out, INNER: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid ``(rows, blocks of gates)``: see :func:`gated`."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < INNER
    source += row * (2 * INNER)
    gate, up = _load(source + channel, inside), _load(source + INNER + channel, inside)
    # by tanh: 0.5 * (1 + tanh(y)) is the logistic function of 2 * y
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    _store(out + row * INNER + channel, gate / (1.0 + tl.exp(-inner)) * up, inside)


def add_norm(
    launch: Launch, x: Tensor, delta: Tensor | None, after: Tensor | None, before: Tensor | None, eps: float
) -> Tensor:
    """``x += norm(delta) * after`` in place, then ``norm(x) * before``, by root mean squares.

    ``x``, ``delta`` ``[rows, width]``; ``after``, ``before`` ``float32 [width]``. ``after`` ``None``: ``delta`` is
    added as it is; ``before`` ``None``: the result is ``x`` itself.
    """
    rows, width = x.shape
    out = None if before is None else torch.empty_like(x)
    block = max(triton.next_power_of_2(width), 128)  # an element for each thread: one alone reads and writes it
    constants = {"WIDTH": width, "BLOCK": block}
    if rows and not (delta is None and before is None):
        args = x, delta, after, before, out, eps
        launch(add_norm_rows, (rows,), args, constants, num_warps=min(max(block // 512, 1), 16))
    return x if out is None else out


def turned(
    launch: Launch, source: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor | None, Tensor | None],
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries ``[rows, heads, dim]``, keys and values ``[rows, kv_heads, dim]`` of the rows ``source`` of all three.

    Queries and keys with their ``norms`` (``float32``, of one head or of all of them) and the rotary embedding:
    ``cos``, ``sin`` ``float32 [rows, turned]`` for a head's first elements, whose halves are turned together.
    """
    rows, turned_dim = cos.shape
    dim = source.shape[1] // (heads + 2 * kv_heads)
    whole = any(norm is not None and len(norm) > dim for norm in norms)
    block = triton.next_power_of_2(max(heads, kv_heads)) if whole else min(_HEADS, triton.next_power_of_2(heads))
    out = source.new_empty(rows, heads + kv_heads, dim)
    if rows:
        constants = {
            "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "TURNED": turned_dim, "BLOCK": block,
            "HALF_BLOCK": triton.next_power_of_2(turned_dim // 2),
            "REST_BLOCK": triton.next_power_of_2(max(dim - turned_dim, 1)), "WHOLE": whole,
        }  # fmt: skip
        grid = rows, triton.cdiv(heads, block) + triton.cdiv(kv_heads, block)
        launch(turn_heads, grid, (source, *norms, cos, sin, out, eps), constants, num_warps=8 if whole else 4)
    query, key = out.split([heads, kv_heads], 1)
    return query, key, source.view(rows, -1, dim)[:, heads + kv_heads :]


def gated(launch: Launch, source: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` ``[rows, inner]`` of rows of gates and ups ``[rows, 2 * inner]``, by ``"silu"`` or
    ``"gelu_tanh"``."""
    rows, inner = source.shape[0], source.shape[1] // 2
    assert activation in ("silu", "gelu_tanh"), activation
    out = source.new_empty(rows, inner)
    if rows:
        block = min(triton.next_power_of_2(inner), _GATES)
        constants = {"INNER": inner, "GELU": activation == "gelu_tanh", "BLOCK": block}
        launch(gate_rows, (rows, triton.cdiv(inner, block)), (source, out), constants, num_warps=4)
    return out
