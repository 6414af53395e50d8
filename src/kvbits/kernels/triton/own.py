"""A token's own page in 16 bit: its rows lie in the open page and, the step's new ones, where the model put them."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS

_TOKENS = tl.constexpr(PAGE_TOKENS)


@triton.jit
def open_index(channel, token, KEY: tl.constexpr, DIM: tl.constexpr):
    """Where an element lies in a 16-bit page, in elements."""
    if KEY:
        return (channel // 2) * (2 * _TOKENS) + 2 * token + channel % 2
    else:
        return (token // 2) * (2 * DIM) + 2 * channel + token % 2


@triton.jit
def load_own(rows, open_page, head, page, start, first_row, end, channels, KEY: tl.constexpr, DIM: tl.constexpr,
             skip=0, COUNT: tl.constexpr = PAGE_TOKENS):  # fmt: skip
    """Elements of the page ``page``, ``bfloat16``: ``[channels, COUNT]`` for keys, ``[COUNT, channels]`` for values,
    tokens from the page's ``skip``-th on.

    ``rows`` are the step's (pointer, stride of a row, stride of a head); the sequence's first new token is ``start``,
    its row ``first_row``. Older tokens come from ``open_page``; tokens from ``end`` on and channels from ``DIM`` on are
    0.
    """
    token = skip + tl.arange(0, COUNT)
    if KEY:
        channel, token = channels[:, None], token[None, :]
    else:
        channel, token = channels[None, :], token[:, None]
    position = page * _TOKENS + token
    inside = channel < DIM
    new = inside & (position >= start) & (position < end)
    row = (first_row + position - start).to(tl.int64)
    x = tl.load(rows[0] + row * rows[1] + head * rows[2] + channel, mask=new, other=0.0)
    if page * _TOKENS < start:
        old = inside & (position < start)
        index = open_index(channel, token, KEY, DIM)
        x = tl.where(old, tl.load(open_page.to(tl.pointer_type(tl.bfloat16)) + index, mask=old, other=0.0), x)
    return x
