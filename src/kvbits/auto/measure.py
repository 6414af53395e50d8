"""The ladder measured: each dtype's KL to the 16-bit cache on the same tokens, through the real pool and kernels.

The 16-bit cache and all dtypes read a window side by side, chunk by chunk, so one chunk's logits are all that is held.
The first window is for all; the others are for those of the fewest bits that may still be under the bound, since more
tokens decide nothing about the rest. Nothing is taken for granted about the order of losses. What the arithmetic's
rounding gives by itself (:func:`kvbits.auto.ladder.almost_nothing`) is taken off, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.auto.ladder import almost_nothing, identity
from kvbits.auto.loss import Loss
from kvbits.codecs import Policy
from kvbits.config import PAGE_TOKENS
from kvbits.engine.engine import Engine
from kvbits.errors import RequestError, UnsupportedError
from kvbits.evaluation.bootstrap import Interval, interval
from kvbits.evaluation.compare import REFERENCE, engine_for
from kvbits.kernels import Backend
from kvbits.models import LoadedModel

CONTENDERS = 2
"""Dtypes that are measured on more than the first window."""

_ROWS = 32
"""Rows compared at once."""

Advance = Callable[[int], None]
Floats = NDArray[np.float64]


def first_scored(context: int) -> int:
    """The first position of a window that is scored: behind a quarter of it."""
    return context // 4


def passes(loaded: LoadedModel, windows: int, rungs: int) -> int:
    """Windows that are computed in all, at most."""
    beside = 1 if almost_nothing(loaded) is None else 2
    return rungs + beside + (windows - 1) * (min(rungs, CONTENDERS) + beside)


def measure(
    loaded: LoadedModel,
    rungs: Sequence[Policy],
    windows: Sequence[Sequence[int]],
    text: str,
    bound: float,
    backend: Callable[[], Backend],
    advance: Advance = lambda tokens: None,
) -> list[Loss]:
    """The loss of every rung (fewest bits first) on ``windows`` (token ids of one length) of ``text``, a name.

    ``bound`` decides only which rungs read more than the first window. ``advance`` is told the tokens computed. Raises
    ``UnsupportedError`` when 16 bit itself gives logits that are not finite.
    """
    context = len(windows[0])
    found: dict[str, list[Floats]] = {rung.label: [] for rung in rungs}
    running, left = list(rungs), passes(loaded, len(windows), len(rungs)) * context
    beside = [policy for policy in [almost_nothing(loaded)] if policy is not None]
    for number, window in enumerate(windows):
        if number == 1:
            running = [rung for rung in rungs if _interval(found[rung.label]).low <= bound][:CONTENDERS]
        if not running:
            break
        left -= (len(running) + len(beside) + 1) * context
        read = _read(loaded, [*running, *beside], window, backend, advance)
        rounding = sum((read.pop(policy.label) for policy in beside), np.zeros(1))
        for label, kl in read.items():
            found[label].append(kl - np.where(np.isfinite(rounding), rounding, 0))
    advance(left)  # what was not needed
    arithmetic = str(loaded.model.dtype).removeprefix("torch.")
    losses = []
    for rung in rungs:
        all_of = _interval(found[rung.label])
        losses.append(
            Loss(identity(rung), all_of.mean, all_of.low, all_of.high, all_of.items, context, text, arithmetic)
        )
    return losses


def _read(
    loaded: LoadedModel,
    rungs: Sequence[Policy],
    window: Sequence[int],
    backend: Callable[[], Backend],
    advance: Advance,
) -> dict[str, Floats]:
    """Each rung's KL at the scored positions of one window, by label; infinite where its logits are not finite."""
    first = first_scored(len(window))
    runs = {rung.label: _forced(_engine(loaded, rung, window, backend), window, first) for rung in rungs}
    found: dict[str, list[Floats]] = {label: [] for label in runs}
    reference = _forced(_engine(loaded, loaded.policy(REFERENCE), window, backend), window, first)
    done = 0
    for end, rows in reference:
        if rows is None:
            raise UnsupportedError(
                f"the logits of {loaded.name} are not finite even with a 16-bit cache, so no dtype can be chosen by "
                "its loss; name one with --kv-cache-dtype"
            )
        advance(end - done)
        for label, run in runs.items():
            _, own = next(run, (end, None))
            found[label].append(np.full(len(rows), np.inf) if own is None else divergence(rows, own))
            advance(end - done)
        done = end
    return {label: np.concatenate(parts) for label, parts in found.items()}


def _engine(loaded: LoadedModel, policy: Policy, window: Sequence[int], backend: Callable[[], Backend]) -> Engine:
    return engine_for(loaded, policy, 1, len(window), backend=backend())


def _forced(engine: Engine, window: Sequence[int], first: int) -> Iterator[tuple[int, Tensor | None]]:
    """Ends of chunks and their logits; ``None`` at the first chunk of which some are not finite."""
    try:
        for start, rows in engine.teacher_forced(window, first):
            yield start + len(rows), rows
    except RequestError:
        yield len(window), None


def divergence(reference: Tensor, own: Tensor) -> Floats:
    """``KL = sum_v p_ref(v) (log p_ref(v) - log p(v))`` of logits ``float32 [rows, vocab]``, float64 ``[rows]``.

    ``= p_ref . (reference - own) + lse(own) - lse(reference)``, where ``lse`` is the logarithm of the sum of
    exponentials: in float32 it is off by about 1e-6 nats.
    """
    parts = []
    for at in range(0, len(reference), _ROWS):
        ref, mine = reference[at : at + _ROWS], own[at : at + _ROWS]
        lse = ref.logsumexp(-1)
        weighted = ((ref - lse.unsqueeze(-1)).exp_() * (ref - mine)).sum(-1)
        parts.append((weighted - lse + mine.logsumexp(-1)).clamp_(min=0).double())
    return torch.cat(parts).numpy()


def _interval(windows: Sequence[Floats]) -> Interval:
    """Of all scored tokens of a rung, over blocks of 64 neighbours."""
    kl = np.concatenate(windows)
    if not np.isfinite(kl).all():
        return Interval(np.inf, np.inf, np.inf, len(kl), 0)
    found = interval(kl, [(w, i // PAGE_TOKENS) for w, part in enumerate(windows) for i in range(len(part))])
    # Nothing loses less than nothing, but a mean of differences may.
    return replace(found, mean=max(found.mean, 0.0), low=max(found.low, 0.0), high=max(found.high, 0.0))
