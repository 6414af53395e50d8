"""Tool calls: does a dtype still write valid JSON, and the call that the 16-bit cache wrote?

Questions and answers are those of the Berkeley Function Calling Leaderboard (Patil et al., 2023): one JSON object a
line, the right answers in ``possible_answer/`` beside it. The functions of many questions stand in one system message,
so that the call depends on a long cache and the questions share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbits.codecs import Policy
from kvbits.config import AUTO
from kvbits.engine.params import SamplingParams
from kvbits.engine.text import encode_chat
from kvbits.errors import ConfigError
from kvbits.evaluation.answers import answer
from kvbits.evaluation.callmatch import arguments_right
from kvbits.evaluation.resume import ResumeCache
from kvbits.evaluation.tasks.files import jsonl
from kvbits.models import LoadedModel

FILE = "BFCL_*simple*.json"
_BEGIN, _OPEN, _END = "<tool_call>\n", '{"name": "', "</tool_call>"
_MAX_TOKENS = 128
_SYSTEM = (
    "You call functions to help the user. The functions, one JSON object a line:\n<tools>\n{tools}\n</tools>\n"
    "Answer with one call and nothing else, in this form:\n"
    '<tool_call>\n{{"name": "the function\'s name", "arguments": {{"parameter": "value"}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Case:
    """A question: ``prompt`` token ids (functions, question and the beginning of the call), and the right answers.

    ``truth`` maps the function's name to its arguments and each argument to the values that are right.
    """

    name: str
    prompt: tuple[int, ...]
    truth: Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Called:
    """What was answered: the call, ``None`` where it is no JSON object with a name and arguments."""

    case: Case
    call: tuple[str, Mapping[str, Any]] | None

    @property
    def right(self) -> bool:
        """Whether function and arguments are among the right answers (:mod:`kvbits.evaluation.callmatch`)."""
        if self.call is None or self.call[0] not in self.case.truth:
            return False
        return arguments_right(self.call[1], self.case.truth[self.call[0]])


def read_cases(loaded: LoadedModel, path: Path, count: int, context: int) -> list[Case]:
    """The first ``count`` questions whose functions together fit ``context`` tokens.

    Raises ``ConfigError`` when a file is missing or of another format, or not even one question fits.
    """
    records = jsonl(path, "id", "question", "function")[:count]
    answers = path.parent / "possible_answer" / path.name
    truths = {r["id"]: r["ground_truth"] for r in jsonl(answers, "id", "ground_truth")}
    while records:
        tools = "\n".join(json.dumps(function) for record in records for function in record["function"])
        cases = [_case(loaded, path, record, tools, truths) for record in records]
        if max(len(c.prompt) for c in cases) + _MAX_TOKENS <= context:
            return cases
        records = records[: len(records) * 4 // 5]
    raise ConfigError(f"no question of '{path}' fits a context of {context} tokens")


def _case(loaded: LoadedModel, path: Path, record: Mapping[str, Any], tools: str, truths: Mapping[str, Any]) -> Case:
    try:
        asked = record["question"][0][-1]["content"]
        needed = {f["name"]: f.get("parameters", {}).get("required", ()) for f in record["function"]}
        # What a function requires may not be left out, even where an empty string says so.
        truth = {
            function: {n: [v for v in values if v != "" or n not in needed[function]] for n, values in expected.items()}
            for function, expected in truths[record["id"]][0].items()
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"the question '{record['id']}' of '{path}' has no text or no answer: {error}") from error
    messages = [{"role": "system", "content": _SYSTEM.format(tools=tools)}, {"role": "user", "content": asked}]
    begin = loaded.tokenizer(_BEGIN + _OPEN, add_special_tokens=False)["input_ids"]
    return Case(str(record["id"]), (*encode_chat(loaded, messages), *begin), truth)


def call_tools(
    loaded: LoadedModel,
    policy: Policy,
    cases: Sequence[Case],
    resume_cache: ResumeCache,
    compute_dtype: str = "float32",
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    state_dtype: str = AUTO,
) -> list[Called]:
    """Answer every question greedily. ``progress`` is told the prompt tokens done since its last call."""
    params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, stop=_END)
    prompts = [case.prompt for case in cases]
    texts = answer(
        "tools", loaded, policy, prompts, params, resume_cache, compute_dtype, max_num_batched_tokens, progress,
        state_dtype,
    )  # fmt: skip
    return [Called(case, read_call(_OPEN + text)) for case, text in zip(cases, texts, strict=True)]


def read_call(text: str) -> tuple[str, Mapping[str, Any]] | None:
    """Name and arguments of the call that ``text`` begins with, if it does."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    name, arguments = found.get("name"), found.get("arguments")
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
