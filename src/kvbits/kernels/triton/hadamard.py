"""The Hadamard rotation in the order of operations of :mod:`kvbits.codecs.hadamard`, which sealed bytes depend on."""

import triton
import triton.language as tl


@triton.constexpr_function
def _norm(block: int) -> float:
    return float(1 / block**0.5)


@triton.jit
def _rows_step(x, STEP: tl.constexpr):
    rows: tl.constexpr = x.shape[0]
    lanes: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [rows // (2 * STEP), 2, STEP, lanes]), (0, 2, 3, 1))
    first, second = tl.split(pairs)
    pairs = tl.permute(tl.join(first + second, first - second), (0, 3, 1, 2))
    return tl.reshape(pairs, [rows, lanes])


@triton.jit
def _lanes_step(x, STEP: tl.constexpr):
    rows: tl.constexpr = x.shape[0]
    lanes: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [rows, lanes // (2 * STEP), 2, STEP]), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(pairs, [rows, lanes])


@triton.jit
def rotate(x, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Rotate ``float32 [a, b]`` down its rows (``ROWS``) or along its lanes, ``BLOCK = 2**STEPS`` at a time."""
    for i in tl.static_range(STEPS):
        x = _rows_step(x, 1 << i) if ROWS else _lanes_step(x, 1 << i)
    return x * _norm(BLOCK)
