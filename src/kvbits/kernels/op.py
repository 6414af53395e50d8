"""Attention on the cache as an operator of torch's: what ``torch.compile`` traces instead of a backend's own code."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """What the operator runs."""

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Store and attend in one layer; shapes as in :meth:`kvbits.kernels.Backend.forward`."""


# An operator takes numbers and tensors only: a step goes by its number, for as long as someone holds it.
_steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()
_numbers = count()


def enlist(step: Step) -> int:
    """The number of ``step`` for :func:`attend_paged`, another one for each."""
    number = next(_numbers)
    _steps[number] = step
    return number


@torch.library.custom_op("kvbits::attend_paged", mutates_args=("cache",))
def attend_paged(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, cache: Tensor, step: int, layer: int
) -> Tensor:
    """``[rows, heads, value_dim]``: store and attend in ``layer`` of the step numbered ``step``, whose pool is
    ``cache``."""
    return _steps[step].run(layer, query, key, value, sinks).contiguous()


@attend_paged.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, cache: Tensor, step: int, layer: int) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])
