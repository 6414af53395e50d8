"""The sampler for logits on a GPU: all rows at once, and only tokens come back.

The rules and their order are those of :mod:`kvbits.engine.sampler`, which is the reference. A draw inverts the
cumulative distribution at the same random number of the request's, over tokens in falling order where top-k or top-p
cut, else as they are numbered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.engine.outputs import Logprob, Logprobs
from kvbits.engine.sampler import NO_TOKEN_LEFT, NOT_FINITE, Sampled, sample
from kvbits.engine.sampling import SamplingState

log = logging.getLogger(__name__)

_NOT_FINITE, _NONE_LEFT = -1, -2


def on_cpu(state: SamplingState) -> str | None:
    """``None``, or which wish of a request makes the CPU choose its tokens."""
    params = state.params
    if state.matcher is not None and (params.min_tokens or params.bans):
        return "a grammar together with min_tokens or bad_words"
    return None


def sample_on_device(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """:func:`kvbits.engine.sampler.sample` for ``logits`` (float32 ``[rows, vocab]``) that stay where they are."""
    slow = [row for row, state in enumerate(states) if on_cpu(state) is not None]
    fast = [row for row in range(len(states)) if row not in slow]
    found: dict[int, Sampled] = {}
    if slow:
        names = {str(on_cpu(states[row])) for row in slow}
        log.debug("The CPU chooses the tokens of %d of %d rows: %s", len(slow), len(states), ", ".join(sorted(names)))
        found |= zip(slow, sample(logits[slow].cpu(), [states[row] for row in slow]), strict=True)
    if fast:
        part = logits if len(fast) == len(states) else logits[fast]
        found |= zip(fast, _sample(part, [states[row] for row in fast]), strict=True)
    return [found[row] for row in range(len(states))]


def _sample(raw: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    adjusted, errors = adjust_rows(raw, states)
    most, tokens = adjusted.max(-1)
    drawn = [row for row, state in enumerate(states) if not state.params.greedy]
    if drawn:
        part = adjusted if len(drawn) == len(states) else adjusted[drawn]
        tokens[drawn] = draw_rows(part, [states[row] for row in drawn])
    tokens = torch.where(most > -torch.inf, tokens, _NONE_LEFT)
    tokens = torch.where(torch.isfinite(raw.amax(-1)), tokens, _NOT_FINITE)
    told = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    reports = dict(zip(told, _reports(raw, tokens, told, states), strict=True)) if told else {}
    words = {_NOT_FINITE: NOT_FINITE, _NONE_LEFT: NO_TOKEN_LEFT}
    chosen = []
    for row, token in enumerate(tokens.tolist()):
        error = errors.get(row) or words.get(token)
        chosen.append(Sampled(token, reports.get(row)) if error is None else Sampled(-1, error=error))
    for row in drawn:
        states[row].uniform()  # only now: a step that failed is tried again with the same numbers
    return chosen


@dataclass
class _Places:
    """Elements of the logits: rows, tokens, and a number for each."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    numbers: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, row: int, tokens: NDArray[np.int64], numbers: NDArray[np.float32] | float = 0.0) -> None:
        self.rows.append(np.full(len(tokens), row, dtype=np.int64))
        self.tokens.append(tokens)
        self.numbers.append(np.broadcast_to(np.asarray(numbers, dtype=np.float32), tokens.shape))

    def apply(self, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the elements by ``change`` of them and the numbers."""
        if self.rows:
            place = tuple(
                torch.from_numpy(np.stack([np.concatenate(self.rows), np.concatenate(self.tokens)])).to(x.device)
            )
            x[place] = change(x[place], torch.from_numpy(np.concatenate(self.numbers)).to(x.device))


def adjust_rows(raw: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor, dict[int, str]]:
    """:func:`kvbits.engine.sampler.adjust` for all rows, the input left as it is; and what failed, by row.

    A row in which no token is left is -inf throughout.
    """
    errors: dict[int, str] = {}
    if all(state.params.unchanged for state in states):
        return raw, errors
    logits = raw.clone()
    bias, repeated, counted, kept, banned = (_Places() for _ in range(5))
    grammars: dict[int, Tensor] = {}
    for row, state in enumerate(states):
        params = state.params
        if params.logit_bias:
            bias.add(row, *params.bias)
        if params.repetition_penalty != 1.0:
            repeated.add(row, state.seen(), params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            tokens, counts = state.generated()
            counted.add(row, tokens, -(params.frequency_penalty * counts + params.presence_penalty))
        if params.allowed is not None:
            kept.add(row, params.allowed)
        forbidden = state.forbidden()
        if forbidden is not None:
            banned.add(row, forbidden)
        if state.matcher is not None:
            try:
                grammars[row] = state.matcher.allowed()
            # foreign code; the rows beside this one must not suffer
            except Exception as error:
                log.exception("a token could not be chosen")
                errors[row] = f"{type(error).__name__}: {error}"
    bias.apply(logits, torch.add)
    repeated.apply(logits, lambda x, penalty: torch.where(x > 0, x / penalty, x * penalty))
    counted.apply(logits, torch.add)
    if kept.rows:
        rest = torch.ones_like(logits, dtype=torch.bool)
        rest[[row for row in range(len(states)) if states[row].params.allowed is None]] = False
        kept.apply(rest, lambda x, _: torch.zeros_like(x))
        logits.masked_fill_(rest, -torch.inf)
    if grammars:
        rows = list(grammars)
        open_to = torch.stack(list(grammars.values())).to(logits.device)
        logits[rows] = logits[rows].masked_fill(~open_to, -torch.inf)
    banned.apply(logits, lambda x, _: torch.full_like(x, -torch.inf))
    return logits, errors


def draw_rows(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token ``int64`` for each row of ``logits``, by the request's next random number, which is not used up."""
    settings = [(p.temperature, p.min_p, p.top_p) for p in (s.params for s in states)]
    temperature, min_p, top_p = torch.tensor(settings, dtype=torch.float32).to(logits.device).T.unsqueeze(-1)
    uniform = torch.tensor([[s.peek(0)] for s in states], dtype=torch.float64).to(logits.device)
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    if any(s.params.min_p > 0.0 for s in states):
        probs = torch.where(probs >= min_p * probs.amax(-1, keepdim=True), probs, 0.0)
    cut = [0 < s.params.top_k < probs.shape[-1] or s.params.top_p < 1.0 for s in states]
    if not any(cut):
        return pick(probs, uniform)
    tokens = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    for which in (False, True):
        rows = [row for row, is_cut in enumerate(cut) if is_cut == which]
        if not rows:
            continue
        if not which:
            tokens[rows] = pick(probs[rows], uniform[rows])
            continue
        most = [s.params.top_k if s.params.top_k > 0 else probs.shape[-1] for s in states]
        top_k = torch.tensor([[most[row]] for row in rows]).to(logits.device)
        weights, ids = probs[rows].sort(dim=-1, descending=True, stable=True)
        weights = cut_tail(weights, top_k, top_p[rows])
        tokens[rows] = ids.gather(-1, pick(weights, uniform[rows]).unsqueeze(-1)).squeeze(-1)
    return tokens


def cut_tail(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Falling ``weights`` ``[rows, vocab]`` with 0 for what top-k, then top-p (``[rows, 1]``) leave out."""
    rank = torch.arange(weights.shape[-1], device=weights.device)
    weights = torch.where(rank < top_k, weights, 0.0)
    before = weights.cumsum(-1) - weights
    kept = (before < top_p * weights.sum(-1, keepdim=True)) | (rank == 0) | (top_p >= 1.0)
    return torch.where(kept, weights, 0.0)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices ``[rows]`` drawn in proportion to ``weights`` ``[rows, n]`` by numbers ``[rows, 1]`` in [0, 1).

    A parallel sum may round up at a weight of 0: what is drawn then is the next token that can be, or the last one.
    """
    cumulative = weights.double().cumsum(-1)
    place = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform, right=True)
    index, size = torch.arange(weights.shape[-1], device=weights.device), weights.shape[-1]
    positive = weights > 0
    following = torch.where(positive & (index >= place), index, size).amin(-1)
    last = torch.where(positive, index, -1).amax(-1)
    return torch.where(following < size, following, last).clamp_min(0)


def _reports(raw: Tensor, tokens: Tensor, rows: list[int], states: Sequence[SamplingState]) -> list[Logprobs]:
    """Log-probabilities as :func:`kvbits.engine.sampler.report` gives them; those of a failed row mean nothing."""
    logprobs = torch.log_softmax(raw[rows], -1)
    chosen = tokens[rows].clamp_min(0).unsqueeze(-1)
    own = logprobs.gather(-1, chosen)
    counts = [min(states[row].params.logprobs or 0, raw.shape[-1]) for row in rows]
    values, ids = torch.topk(logprobs, max(counts)) if max(counts) else (logprobs[:, :0], chosen[:, :0])
    ranks = (logprobs > own).sum(-1) + 1
    parts = zip(chosen[:, 0].tolist(), own[:, 0].tolist(), ranks.tolist(), values.tolist(), ids.tolist(), strict=True)
    reports = []
    for count, (token, logprob, rank, likeliest, their) in zip(counts, parts, strict=True):
        report = {token: Logprob(logprob, rank)}
        for place, (value, other) in enumerate(zip(likeliest[:count], their[:count], strict=True), start=1):
            report.setdefault(other, Logprob(value, place))
        reports.append(report)
    return reports
