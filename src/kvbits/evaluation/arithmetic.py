"""School arithmetic in several steps: where one wrong token of the reasoning gives a wrong answer.

Questions and answers are GSM8K's (Cobbe et al., 2021, arXiv:2110.14168): one JSON object a line, the answer's last line
``#### number``. The model reasons in a chat; its answer is the last number that it marks, with ``####`` as it was
asked or with ``\\boxed{}`` as models are trained to, else its last number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from kvbits.codecs import Policy
from kvbits.config import AUTO
from kvbits.engine.params import SamplingParams
from kvbits.engine.text import encode_chat
from kvbits.errors import ConfigError
from kvbits.evaluation.answers import answer
from kvbits.evaluation.resume import ResumeCache
from kvbits.evaluation.tasks.files import jsonl
from kvbits.models import LoadedModel

FILE = "gsm8k*.jsonl"
MAX_TOKENS = 400
"""Longest answer, in tokens (half of the context where that is less): GSM8K's own have 300 at most."""

_ASK = (
    "{question}\n\nReason step by step. Write the final number, and nothing else, in a last line that begins with ####."
)
_NUMBER = r"((?:(?<![\w)])-\$?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/[1-9]\d*)?)(?!\d)"
_MARK = r"####|\\boxed\{"
# A number and what looks like the next heading of a list ("#### 2. Add") is no answer.
_MARKED = re.compile(rf"(?:####[\W_]*?|\\boxed\{{[^\n}}\d]*?){_NUMBER}(?!\.\s+\w|:)")


@dataclass(frozen=True)
class Problem:
    """``prompt`` token ids, the right number, and the tokens that the answer may have."""

    prompt: tuple[int, ...]
    truth: Decimal
    room: int = MAX_TOKENS


@dataclass(frozen=True)
class Solved:
    """An answer's text."""

    problem: Problem
    text: str

    @property
    def number(self) -> Decimal | None:
        """The answer's number, ``None`` where it has none."""
        return read_number(self.text)

    @property
    def right(self) -> bool:
        """Whether it is the right one."""
        return self.number == self.problem.truth


def read_number(text: str) -> Decimal | None:
    """The last number behind a mark, else the last one (behind the last mark, if any); ``None`` where there is none."""
    found = _MARKED.findall(text) or re.findall(_NUMBER, re.split(_MARK, text)[-1])
    if not found:
        return None
    number, _, divisor = re.sub(r"[,$]", "", found[-1]).partition("/")
    return Decimal(number) / Decimal(divisor) if divisor else Decimal(number)


def read_problems(loaded: LoadedModel, path: Path, count: int, context: int) -> list[Problem]:
    """The first ``count`` problems that fit ``context`` tokens with their answers.

    Raises ``ConfigError`` for a file of another format, or where no problem fits.
    """
    problems, room = [], min(MAX_TOKENS, context // 2)
    for record in jsonl(path, "question", "answer")[:count]:
        truth = read_number(str(record["answer"]))
        if truth is None:
            raise ConfigError(f"an answer of '{path}' has no number: '{record['answer']}'")
        messages = [{"role": "user", "content": _ASK.format(question=record["question"])}]
        prompt = tuple(encode_chat(loaded, messages))
        if len(prompt) + room <= context:
            problems.append(Problem(prompt, truth, room))
    if not problems:
        raise ConfigError(f"no problem of '{path}' fits a context of {context} tokens with {room} for its answer")
    return problems


def solve(
    loaded: LoadedModel,
    policy: Policy,
    problems: Sequence[Problem],
    resume_cache: ResumeCache,
    compute_dtype: str = "float32",
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    state_dtype: str = AUTO,
) -> list[Solved]:
    """Answer every problem greedily. ``progress`` is told the prompt tokens done since its last call."""
    params = SamplingParams(max_tokens=problems[0].room, temperature=0.0)
    prompts = [problem.prompt for problem in problems]
    texts = answer(
        "gsm8k", loaded, policy, prompts, params, resume_cache, compute_dtype, max_num_batched_tokens, progress,
        state_dtype,
    )  # fmt: skip
    return [Solved(problem, text) for problem, text in zip(problems, texts, strict=True)]
