"""What may be evaluated, what each part needs, and running the chosen parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvbits.config import AUTO
from kvbits.engine.text import encode
from kvbits.errors import ConfigError
from kvbits.evaluation import arithmetic, toolcalls
from kvbits.evaluation.documents import reference_text
from kvbits.evaluation.laboratory import Laboratory, plant_fault
from kvbits.evaluation.parts import ARITHMETIC, FIDELITY, GENERATION, LAYERS, TOOLS, parts_of
from kvbits.evaluation.speed import distinct_prompts
from kvbits.evaluation.tasks import TASKS, Material
from kvbits.evaluation.tasks.files import find
from kvbits.evaluation.windows import cut_windows
from kvbits.models import LoadedModel

_FILES = {TOOLS: (toolcalls.FILE,), ARITHMETIC: (arithmetic.FILE,)}
_LAYER_WINDOWS = 2
_PROMPT_TOKENS = 256
_CHECK_TOKENS = 1024
"""Longest window of the self-check, which runs one page a step."""

_SHORTEST = 128
"""Tokens of the shortest prompt that a task can be asked in."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything: tokens, windows, documents, questions."""

    context: int = 2048
    windows: int = 8
    task_context: int | None = None
    depths: int = 5
    samples: int = 1
    texts: int = 4
    new_tokens: int = 256
    tool_questions: int = 20
    problems: int = 100
    all_positions: bool = False

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "texts", "new_tokens", "tool_questions", "problems"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class TaskSelection:
    """The parts to run, and the files that they need (by the name or pattern that a task knows them by)."""

    parts: tuple[str, ...]
    files: dict[str, Path] = field(default_factory=dict)


def choose(tasks: str, has_text: bool, data_dir: Path | None) -> TaskSelection:
    """Read ``--tasks`` (names with commas, or ``all``) and find the data files.

    Raises ``ConfigError`` for an unknown name, a text that is missing or a file that is.
    """
    parts = parts_of(tasks, has_text)
    files: dict[str, Path] = {}
    for name in parts:
        for pattern in TASKS[name].needs if name in TASKS else _FILES.get(name, ()):
            path = find(data_dir, pattern)
            if path is None:
                where = f"in '{data_dir}'" if data_dir else "without --data-dir DIR"
                raise ConfigError(f"the task '{name}' needs a file named like '{pattern}'; there is none {where}")
            files[pattern] = path
        for pattern in TASKS[name].uses if name in TASKS else ():
            path = find(data_dir, pattern)
            if path is not None:
                files[pattern] = path
    return TaskSelection(parts, files)


def run_tasks(
    laboratory: Laboratory, selection: TaskSelection, tokens: Sequence[int], book: str | None, sizes: Sizes
) -> None:
    """Run every chosen part. ``tokens`` are the text's; ``book`` is what facts are hidden in (default: the reference).

    Raises ``ConfigError`` when a text is too short or a context too long, before the first part runs.
    """
    loaded = laboratory.loaded
    task_context = _task_context(loaded, sizes)
    windows: list[list[int]] = []
    if FIDELITY in selection.parts or LAYERS in selection.parts:
        windows = cut_windows(tokens, sizes.context, sizes.windows)
    prompts: list[list[int]] = []
    if GENERATION in selection.parts:
        if _PROMPT_TOKENS + sizes.new_tokens > loaded.geometry.max_position:
            raise ConfigError(
                f"{sizes.new_tokens} new tokens after prompts of {_PROMPT_TOKENS} exceed the "
                f"{loaded.geometry.max_position} tokens of {loaded.name}"
            )
        prompts = distinct_prompts(tokens, _PROMPT_TOKENS, sizes.texts)
    material = _material(loaded, selection, book, sizes, task_context)
    probes = {name: TASKS[name].make(material) for name in selection.parts if name in TASKS}
    cases = []
    if TOOLS in selection.parts:
        cases = toolcalls.read_cases(loaded, selection.files[toolcalls.FILE], sizes.tool_questions, task_context)
    problems = []
    if ARITHMETIC in selection.parts:
        problems = arithmetic.read_problems(loaded, selection.files[arithmetic.FILE], sizes.problems, task_context)
    if FIDELITY in selection.parts:
        laboratory.text(windows, sizes.all_positions)
    if LAYERS in selection.parts:
        laboratory.layers(windows[:_LAYER_WINDOWS])
    for name, questions in probes.items():
        laboratory.long_context(name, questions)
    if GENERATION in selection.parts:
        laboratory.generation(prompts, sizes.new_tokens)
    if TOOLS in selection.parts:
        laboratory.tools(cases)
    if ARITHMETIC in selection.parts:
        laboratory.arithmetic(problems)


def _task_context(loaded: LoadedModel, sizes: Sizes) -> int:
    longest = loaded.geometry.max_position
    asked = longest if sizes.task_context is None else sizes.task_context
    if not _SHORTEST <= asked <= longest:
        raise ConfigError(f"the task context is {asked} tokens; {loaded.name} can have {_SHORTEST} to {longest}")
    return asked


def _material(loaded: LoadedModel, selection: TaskSelection, book: str | None, sizes: Sizes, longest: int) -> Material:
    lengths = sorted({max(_SHORTEST, longest // part) for part in (4, 2, 1)})
    return Material(
        encode=lambda text: encode(loaded, text),
        encode_more=lambda text: loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        text=reference_text() if book is None else book,
        lengths=tuple(lengths),
        depths=sizes.depths,
        samples=sizes.samples,
        files=selection.files,
    )


def self_check(
    laboratory: Laboratory, selection: TaskSelection, tokens: Sequence[int], sizes: Sizes
) -> list[dict[str, Any]]:
    """Results of the same policies with a planted fault, on one window of the text.

    Raises ``ConfigError`` where fidelity is not among the parts.
    """
    if FIDELITY not in selection.parts:
        raise ConfigError("--self-check needs the task fidelity")
    return plant_fault(laboratory, cut_windows(tokens, min(sizes.context, _CHECK_TOKENS), 1))


def document(
    laboratory: Laboratory,
    rows: Sequence[Mapping[str, Any]],
    sizes: Sizes,
    text: Path | None,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``kvbits evaluate --json`` writes, and what the report is made from."""
    settings = {
        "text": text.name if text else "none",
        "arithmetic of the text": laboratory.compute_dtype,
        "of tasks": laboratory.served_dtype,
        **asdict(sizes),
        **({} if laboratory.state_dtype == AUTO else {"recurrent states": laboratory.state_dtype}),
    }
    flat = rows[0] if len(rows) == 1 else {}
    facts = {"model": laboratory.loaded.name, "text": None if text is None else str(text), **machine}
    return {**flat, "results": list(rows), "settings": settings, **facts}
