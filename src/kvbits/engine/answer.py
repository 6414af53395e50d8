"""From a step's logits to the tokens that it brings: one for each sequence, and more where guesses hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from kvbits.engine.device_sampler import sample_on_device
from kvbits.engine.outputs import Delta
from kvbits.engine.request_state import RequestState
from kvbits.engine.sampler import NOT_FINITE, Sampled, finite_rows, report, sample
from kvbits.engine.sampling import SamplingState
from kvbits.engine.scheduler import ScheduledRequest

log = logging.getLogger(__name__)

Choose = Callable[[Tensor, Sequence[SamplingState]], list[Sampled]]
"""How tokens are chosen where the logits are."""


@dataclass
class Answer:
    """What a step brought to one sequence; ``error``: why it cannot go on.

    All deltas but the last are guesses that held. None: the sequence is not due a token yet.
    """

    deltas: list[Delta] = field(default_factory=list)
    error: str | None = None

    @property
    def accepted(self) -> int:
        """Guessed tokens that the cache now holds rightly."""
        return max(len(self.deltas) - 1, 0)


def answer(works: Sequence[ScheduledRequest], logits: Tensor, states: Mapping[int, RequestState]) -> list[Answer]:
    """Choose the tokens of each work and append them to its sequence; ``logits`` float32 ``[outputs, vocab]``.

    What fails for one sequence is its own error.
    """
    choose = sample if logits.device.type == "cpu" else sample_on_device
    answers = [Answer() for _ in works]
    parts = [logits[:0]] * len(works)
    single: dict[int, int] = {}
    row = 0
    for index, work in enumerate(works):
        parts[index] = logits[row : row + work.outputs]
        row += work.outputs
        state = states[work.request.seq_id]
        if state.prompt_logprobs is not None and work.outputs:
            if all(finite_rows(parts[index])):
                with _own_error(answers[index]):
                    _report_prompt(state, work, parts[index].cpu())
            else:
                answers[index].error = NOT_FINITE
        if work.samples and not work.draft:
            single[index] = row - 1
    if single:
        rows = list(single.values())
        plain = [states[works[index].request.seq_id].sampling for index in single]
        chosen = dict(zip(single, choose(logits if len(rows) == row else logits[rows], plain), strict=True))
    for index, work in enumerate(works):
        found, state = answers[index], states[work.request.seq_id]
        if not work.samples or found.error is not None:
            continue
        with _own_error(found):
            if work.draft:
                _verify(found, state, work.draft, parts[index], choose)
            else:
                _extend(found, state, chosen[index])
    return answers


@contextmanager
def _own_error(found: Answer) -> Iterator[None]:
    """Whatever is raised inside ends this sequence, and no other one."""
    try:
        yield
    except Exception as error:
        log.exception("a token could not be chosen")
        found.error = f"{type(error).__name__}: {error}"


def _verify(found: Answer, state: RequestState, draft: Sequence[int], logits: Tensor, choose: Choose) -> None:
    """Choose token after token, each as it would be without a draft, as long as the draft has foreseen it.

    For a fixed guess this is rejection sampling: a token is kept with the probability that the model gives it, and what
    stands in its place otherwise follows the model's distribution. Since the choice is made with the request's next
    random number, the answer is even the same as without speculation. ``logits``: the last ``len(draft) + 1`` rows.
    """
    logits = logits[-len(draft) - 1 :]
    ahead = choose(logits, [state.sampling] * len(logits)) if state.request.params.plain_greedy else None
    for row in range(len(logits)):
        sampled = ahead[row] if ahead is not None else choose(logits[row : row + 1], [state.sampling])[0]
        _extend(found, state, sampled)
        if found.error is not None or state.request.finished or row == len(draft) or sampled.token != draft[row]:
            break


def _extend(found: Answer, state: RequestState, sampled: Sampled) -> None:
    if sampled.error is not None:
        found.error = sampled.error
    else:
        found.deltas.append(state.accept(sampled.token, sampled.logprobs))


def _report_prompt(state: RequestState, work: ScheduledRequest, logits: Tensor) -> None:
    """Add the log-probabilities of the prompt tokens that ``logits`` predict, each once."""
    assert state.prompt_logprobs is not None
    prompt, count = state.request.prompt, state.request.params.prompt_logprobs or 0
    for offset in range(len(state.prompt_logprobs) - 1 - work.start, len(logits)):
        position = work.start + offset + 1
        if offset >= 0 and position < len(prompt):
            state.prompt_logprobs.append(report(logits[offset], prompt[position], count))
