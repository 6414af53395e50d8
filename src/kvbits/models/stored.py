"""Parameters that stay in their files until the layers that have them are packed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

_BLOCK = 1 << 17
"""Elements that are unpacked at a time, so that what is made on the way stays in the processor's cache."""

_PIECE = (1 << 15) - 1
"""Elements that torch converts at a time: more would start its own threads in each of ours."""


class StoredParameter(nn.Parameter):
    """A layer's parameter in its file: it lies in a map, in the file's own type, or, where it has to be unpacked first
    (then it is on torch's device ``meta``), nowhere.

    ``read(first, last)`` gives rows (all dimensions but the last counted together) in any type, ``release(first,
    last)`` gives their memory of the map back.
    """

    read: Callable[[int, int], Tensor]
    release: Callable[[int, int], None]

    def __new__(
        cls, values: Tensor, read: Callable[[int, int], Tensor], release: Callable[[int, int], None]
    ) -> StoredParameter:
        made: StoredParameter = super().__new__(cls, values, requires_grad=False)
        made.read, made.release = read, release
        return made

    def rows(self, wanted: Tensor) -> Tensor:
        """Some rows, ``int64 [n]``, as ``float32 [n, in]``."""
        return torch.cat([self.read(row, row + 1) for row in wanted.tolist()]).float()


def settled(parameter: StoredParameter, dtype: torch.dtype) -> Tensor:
    """The whole parameter as ``dtype``, unpacked in as many threads as torch computes with."""
    if not parameter.is_meta:
        return parameter.detach().to(dtype)
    whole = torch.empty(parameter.shape, dtype=dtype)
    width = max(1, parameter.shape[-1])
    rows, step = whole.numel() // width, max(1, _BLOCK // width)

    def unpack(first: int) -> None:
        last = min(first + step, rows)
        values, to = parameter.read(first, last).reshape(-1), whole.view(-1)[first * width : last * width]
        for at in range(0, len(values), _PIECE):
            to[at : at + _PIECE].copy_(values[at : at + _PIECE])
        parameter.release(first, last)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(unpack, first) for first in range(0, rows, step)]:
            done.result()
    return whole
