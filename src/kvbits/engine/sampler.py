"""From logits to tokens.

The order is vLLM's: report raw log-probabilities, then bias and penalties, the grammar's mask, temperature, min-p,
top-k, top-p, draw.
A draw inverts the cumulative distribution at the request's next random number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbits.engine.outputs import Logprob, Logprobs
from kvbits.engine.sampling import SamplingState
from kvbits.errors import RequestError

log = logging.getLogger(__name__)

NOT_FINITE = (
    "the model produced logits that are not finite (NaN or an infinity): a weight is broken, or this input makes its "
    "arithmetic overflow"
)
"""Why no token can be chosen, or a log-probability given."""

NO_TOKEN_LEFT = "no token is left that allowed_token_ids, bad_words, min_tokens and the grammar all allow"
"""Why no token can be chosen, by the request's own rules."""

_HEAD = 256
"""How many of the likeliest tokens are put in order; where more are needed, a threshold says which."""


@dataclass(frozen=True)
class Sampled:
    """A chosen token; or ``error``, why none could be chosen."""

    token: int
    logprobs: Logprobs | None = None
    error: str | None = None


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose a token for each row of ``logits`` (float32 ``[rows, vocab]``)."""
    best, argmax = logits.max(dim=-1)
    tokens = argmax.tolist()
    finite = _can_be_drawn_from(best)
    chosen = []
    for row, state in enumerate(states):
        if not finite[row]:
            chosen.append(Sampled(-1, error=NOT_FINITE))
        elif state.params.plain_greedy:
            chosen.append(Sampled(tokens[row]))
        else:
            chosen.append(_try_row(logits[row], state))
    return chosen


def finite_rows(logits: Tensor) -> list[bool]:
    """Which rows of the model's ``logits`` ``[rows, vocab]`` have a softmax; -inf is a token that never comes."""
    return _can_be_drawn_from(logits.amax(dim=-1))


def _can_be_drawn_from(best: Tensor) -> list[bool]:
    """By the rows' maxima: one carries a NaN of its row along, and an infinite one has no softmax."""
    finite: list[bool] = torch.isfinite(best).tolist()
    return finite


def _try_row(raw: Tensor, state: SamplingState) -> Sampled:
    try:
        return _sample_row(raw, state)
    except RequestError as error:
        return Sampled(-1, error=str(error))
    # A grammar's matcher is foreign code; the rows beside this one must not suffer.
    except Exception as error:
        log.exception("a token could not be chosen")
        return Sampled(-1, error=f"{type(error).__name__}: {error}")


def _sample_row(raw: Tensor, state: SamplingState) -> Sampled:
    params = state.params
    logits = adjust(raw, state)
    if params.greedy:
        token = int(logits.argmax())
    else:
        probs, ids = distribution(logits, params.temperature, params.top_k, params.top_p, params.min_p)
        place = draw(probs, state.uniform())
        token = place if ids is None else int(ids[place])
    if params.logprobs is None:
        return Sampled(token)
    return Sampled(token, report(raw, token, params.logprobs, params.logprob_token_ids))


def adjust(raw: Tensor, state: SamplingState) -> Tensor:
    """Logits ``[vocab]`` with the request's bias, penalties, bans and grammar; the input is left as it is.

    Raises ``RequestError`` when no token is allowed.
    """
    params = state.params
    if params.unchanged:
        return raw
    logits = raw.clone()
    if params.logit_bias:
        ids, change = (torch.from_numpy(array).to(raw.device) for array in params.bias)
        logits.index_add_(0, ids, change)
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(state.seen()).to(raw.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        tokens, counts = (torch.from_numpy(array).to(raw.device) for array in state.generated())
        logits.index_add_(0, tokens, -(params.frequency_penalty * counts + params.presence_penalty))
    if params.allowed is not None:
        kept = torch.from_numpy(params.allowed).to(raw.device)
        logits = torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])
    free = logits
    if state.matcher is not None:
        free = logits = logits.masked_fill(~state.matcher.allowed().to(raw.device), -torch.inf)
    forbidden = state.forbidden()
    if forbidden is not None:
        logits = logits.index_fill(0, torch.from_numpy(forbidden).to(raw.device), -torch.inf)
        # Where a grammar leaves nothing else, it goes before.
        if state.matcher is not None and not torch.isfinite(logits.max()):
            logits = free
    if not torch.isfinite(logits.max()):
        raise RequestError(NO_TOKEN_LEFT)
    return logits


def distribution(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor | None]:
    """What is drawn from: weights (float32, need not sum to one) and the token of each, ``None``: all in order."""
    probs = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    if min_p > 0.0:
        probs = torch.where(probs >= min_p * probs.max(), probs, 0.0)
    ids: Tensor | None = None
    if 0 < top_k < probs.numel():
        probs, ids = likeliest(probs, top_k)
    if top_p < 1.0:
        mass = top_p * float(probs.sum())
        place = None
        if probs.numel() > _HEAD:
            head, place = torch.topk(probs, _HEAD)
            if float(head.sum()) < mass:
                place = None
        if place is None:
            head = falling(probs)
        keep = max(int((head.cumsum(-1) - head < mass).sum()), 1)
        if place is None:
            probs, place = likeliest(probs, keep)
        else:
            probs, place = head[:keep], place[:keep]
        ids = place if ids is None else ids[place]
    return probs, ids


def falling(values: Tensor) -> Tensor:
    """``values`` (one dimension) in falling order. NumPy sorts numbers alone a hundred times as fast as torch."""
    return torch.from_numpy(np.sort(values.numpy(force=True))[::-1].copy()).to(values.device)


def likeliest(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of ``probs`` (one dimension) and their places; of equal ones the first.

    Up to 256 come in falling order, more in the order of their places: there is no need to sort them.
    """
    if count <= _HEAD:
        head, place = torch.topk(probs, min(count, probs.numel()))
        return head, place
    values = probs.numpy(force=True)
    edge = np.partition(values, len(values) - count)[len(values) - count]
    kept = values > edge
    kept[np.flatnonzero(values == edge)[: count - int(kept.sum())]] = True
    place = torch.from_numpy(np.flatnonzero(kept)).to(probs.device)
    return probs[place], place


def draw(weights: Tensor, uniform: float) -> int:
    """Index drawn in proportion to ``weights`` (one dimension) by a number in [0, 1)."""
    cumulative = weights.double().cumsum(-1)
    place = int(torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True))
    # Rounding can put the product on the total itself; the last token of positive weight is meant then.
    if place >= weights.numel():
        place = int(weights.nonzero()[-1])
    return place


def report(raw: Tensor, token: int, count: int, others: Sequence[int] = ()) -> Logprobs:
    """Log-probabilities of ``token`` and of the ``count`` likeliest tokens under ``raw`` (float32 ``[vocab]``), or,
    where ``others`` are named, of ``token`` and these."""
    if not 0 <= token < raw.numel():
        raise RequestError(f"token {token} has no log-probability; the vocabulary is 0 to {raw.numel() - 1}")
    logprobs = torch.log_softmax(raw, dim=-1)
    found = {}
    for named in (token, *others):
        own = logprobs[named]
        found[named] = Logprob(float(own), int((logprobs > own).sum()) + 1)
    if count and not others:
        values, ids = torch.topk(logprobs, min(count, raw.numel()))
        for rank, (value, index) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
            found.setdefault(index, Logprob(value, rank))
    return found
