"""From a step's logits to the tokens that it brings: one for each sequence, and more where guesses hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvbits.engine.live import Live
from kvbits.engine.outputs import Delta
from kvbits.engine.sampler import NOT_FINITE, Sampled, finite_rows, report, sample
from kvbits.engine.scheduler import Work


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


def answer(works: Sequence[Work], logits: Tensor, lives: Mapping[int, Live]) -> list[Answer]:
    """Choose the tokens of each work and append them to its sequence; ``logits`` float32 ``[outputs, vocab]``."""
    parts = [logits[:0]] * len(works)
    single: list[int] = []
    unreported: set[int] = set()  # works whose prompt has no log-probabilities
    row = 0
    for index, work in enumerate(works):
        parts[index] = logits[row : row + work.outputs]
        row += work.outputs
        live = lives[work.request.seq_id]
        if live.prompt_logprobs is not None and work.outputs:
            if all(finite_rows(parts[index])):
                _report_prompt(live, work, parts[index])
            else:
                unreported.add(index)
        if work.samples and not work.draft:
            single.append(row - 1)
    plain = [lives[w.request.seq_id].sampling for w in works if w.samples and not w.draft]
    chosen: Iterator[Sampled] = iter(())
    if single:
        chosen = iter(sample(logits if len(single) == row else logits[single], plain))
    answers = []
    for index, (work, part) in enumerate(zip(works, parts, strict=True)):
        live = lives[work.request.seq_id]
        sampled = next(chosen) if work.samples and not work.draft else None
        if index in unreported:
            answers.append(Answer(error=NOT_FINITE))
        elif not work.samples:
            answers.append(Answer())
        elif work.draft:
            answers.append(_verify(live, work.draft, part))
        else:
            assert sampled is not None
            answers.append(_extend(Answer(), live, sampled))
    return answers


def _verify(live: Live, draft: Sequence[int], logits: Tensor) -> Answer:
    """Choose token after token, each as it would be without a draft, as long as the draft has foreseen it.

    For a fixed guess this is rejection sampling: a token is kept with the probability that the model gives it, and what
    stands in its place otherwise follows the model's distribution. Since the choice is made with the request's next
    random number, the answer is even the same as without speculation. ``logits`` ``[len(draft) + 1, vocab]``.
    """
    found = Answer()
    ahead = sample(logits, [live.sampling] * len(logits)) if live.request.params.plain_greedy else None
    for row in range(len(logits)):
        sampled = ahead[row] if ahead is not None else sample(logits[row : row + 1], [live.sampling])[0]
        _extend(found, live, sampled)
        if found.error is not None or live.request.finished or row == len(draft) or sampled.token != draft[row]:
            break
    return found


def _extend(found: Answer, live: Live, sampled: Sampled) -> Answer:
    if sampled.error is not None:
        found.error = sampled.error
    else:
        found.deltas.append(live.accept(sampled.token, sampled.logprobs))
    return found


def _report_prompt(live: Live, work: Work, logits: Tensor) -> None:
    """Add the log-probabilities of the prompt tokens that ``logits`` predict, each once."""
    assert live.prompt_logprobs is not None
    prompt, count = live.request.prompt, live.request.params.prompt_logprobs or 0
    for offset in range(len(live.prompt_logprobs) - 1 - work.start, len(logits)):
        position = work.start + offset + 1
        if offset >= 0 and position < len(prompt):
            live.prompt_logprobs.append(report(logits[offset], prompt[position], count))
