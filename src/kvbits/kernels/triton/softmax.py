"""One block of keys and values at a time, with the running maximum and sum of the softmax; logarithms to base 2."""

import triton
import triton.language as tl

from kvbits.kernels.triton.numbers import INTERPRETED, convert, widen

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, c=None):
    """``a @ b + c`` in float32: exact products for ``float32`` rows, else ``b`` rounded to the type of ``a``."""
    b = convert(b, a.dtype)
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    elif INTERPRETED:
        return tl.dot(widen(a), widen(b), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def logits(scores, SHAPE: tl.constexpr):
    """Scaled and capped products of queries and keys, to base 2."""
    scores = scores * SHAPE.scale
    if SHAPE.softcap > 0:
        # tanh by one exponential; where that overflows the quotient is 0
        scores = SHAPE.softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SHAPE.softcap)) + 1.0))
    return scores * _LOG2E


@triton.jit
def rescaled(scores, m):
    """The new maxima, by what earlier sums shrink, and the weights of ``scores`` ``[m, 64]``."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    # rows that have seen nothing yet have no maximum to subtract
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - base), tl.exp2(scores - base[:, None])


@triton.jit
def accumulate(scores, values, m, total, acc, DOT: tl.constexpr):
    """Take in a block: ``scores`` ``[m, 64]``, -inf where nothing is seen, ``values`` ``[64, dim]``; the new state."""
    m, alpha, weights = rescaled(scores, m)
    total = total * alpha + tl.sum(weights, 1)
    acc = acc * alpha[:, None] + product(convert(weights, DOT), values)
    return m, total, acc


@triton.jit
def finish(m, total, acc, sinks, heads, SHAPE: tl.constexpr):
    """The weighted mean; ``sinks`` are logits of query heads that take weight and bring no value."""
    if SHAPE.sinks:
        sink = tl.load(sinks + heads) * _LOG2E
        m_new = tl.maximum(m, sink)
        total = total * tl.exp2(m - m_new) + tl.exp2(sink - m_new)
        acc = acc * tl.exp2(m - m_new)[:, None]
    return acc / total[:, None]
