"""Results files of the other commands, told apart by what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbits.config import POLICY_PREFIX
from kvbits.errors import ConfigError

Record = Mapping[str, Any]

# The numbers that the page shows.
_PLAN = ("memory_bytes", "weights_bytes", "workspace_bytes", "cache_bytes")
_SCHEME = ("bits_per_element", "kv_bytes_per_token", "longest_context")
_CONTEXT = ("context", "sessions", "running", "gain_over_16bit")
_TIMED = (
    "batch", "context", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_step_ms", "kv_bytes_per_token"
)  # fmt: skip
_QUALITY = (
    "bits_per_element", "effective_bits_per_element", "perplexity", "perplexity_16bit", "kl_mean", "kl_p99",
    "top1_agreement",
)  # fmt: skip


@dataclass
class Gathered:
    """What was found, in the order of the files. ``evaluated`` and ``timed`` hold one record a dtype.

    ``evaluated``: fidelity of ``kvbits evaluate``. ``policies``: ``policy.json`` of ``kvbits calibrate``, with the
    directory's name under ``name``. ``plans``: ``kvbits plan``. ``timed``: ``kvbits bench``. ``files``: what each file
    was taken for.
    """

    model: str = ""
    evaluated: list[Record] = field(default_factory=list)
    policies: list[Record] = field(default_factory=list)
    plans: list[Record] = field(default_factory=list)
    timed: list[Record] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)


def gather(paths: Iterable[Path]) -> Gathered:
    """Read JSON files (and directories of policies). Later results of a dtype replace earlier ones.

    Policies are known by their directories' names, whatever the path was when they were evaluated.

    Raises ``ConfigError`` for a file that is none of them, for results of different models, and when nothing is given.
    """
    found = Gathered()
    owners: dict[str, Path] = {}
    for path in paths:
        document = _read(path / "policy.json" if path.is_dir() else path)
        kind = _add(found, path, document)
        found.files.append((path.name, kind))
        owner = document["model"]["name"] if kind == "policy" else document.get("model", "")
        owners.setdefault(_short(str(owner)), path)
    if not owners:
        raise ConfigError("there are no results to report; give JSON files that other commands wrote with --json")
    if len(owners) > 1:
        listed = ", ".join(f"{name} ('{path}')" for name, path in owners.items())
        raise ConfigError(f"the results are of different models: {listed}; a report is about one")
    found.model = next(iter(owners))
    return found


def _short(name: str) -> str:
    """One name for the ways to write a model: the last part of a path or a hub id."""
    short = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return short.removesuffix(".json").removesuffix(".gguf").removesuffix("-instruct")


def _policy(dtype: Any) -> Any:
    """A policy by its directory's name, as the planner has it: results say ``policy:PATH``."""
    text = str(dtype)
    return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith(POLICY_PREFIX) and "/" in text else dtype


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the results '{path}': {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' is no JSON file: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"'{path}' holds no results: it is no JSON object")
    return document


def _add(found: Gathered, path: Path, document: dict[str, Any]) -> str:
    rows = document.get("results")
    if isinstance(rows, list):
        rows = [
            {**row, "dtype": _policy(row["dtype"])} if isinstance(row, dict) and "dtype" in row else row for row in rows
        ]
    if document.get("format") == "kvbits-policy":
        _need(path, document.get("model"), texts=("name",))
        if not isinstance(document.get("layers"), list) or not all(isinstance(x, str) for x in document["layers"]):
            raise ConfigError(f"the results in '{path}' are damaged: the policy has no 'layers'")
        name = path.name if path.is_dir() else path.resolve().parent.name
        found.policies.append({**document, "name": name})
        return "policy"
    if "schemes" in document:
        _need(path, document, _PLAN, lists=("schemes",))
        for scheme in document["schemes"]:
            _need(path, scheme, _SCHEME, ("dtype",), ("contexts",))
            for context in scheme["contexts"]:
                _need(path, context, _CONTEXT)
        found.plans.append(document)
        return "plan"
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        shared = {k: v for k, v in document.items() if k not in ("results", "model")}
        for row in rows:
            _need(path, row, texts=("dtype",))
        if "decode_tokens_per_s" in rows[0]:
            for row in rows:
                _need(path, row, _TIMED)
            _replace(found.timed, [{**shared, **row} for row in rows], ("dtype", "context", "batch"))
            return "bench"
        if "kl_mean" in rows[0] or "verdict" in rows[0]:
            for row in rows:
                _need(path, row, _QUALITY if "kl_mean" in row else ())
            _replace(found.evaluated, rows, ("dtype",))
            return "evaluate"
    raise ConfigError(f"'{path}' holds no results of evaluate, calibrate, plan or bench")


def _need(
    path: Path, record: Any, numbers: Iterable[str] = (), texts: Iterable[str] = (), lists: Iterable[str] = ()
) -> None:
    """Raise ``ConfigError`` unless ``record`` is an object with these fields, of these types."""
    kinds: tuple[tuple[Iterable[str], tuple[type, ...], str], ...] = (
        (numbers, (int, float), "number"),
        (texts, (str,), "text"),
        (lists, (list,), "list"),
    )
    for names, kind, what in kinds:
        for name in names:
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise ConfigError(f"the results in '{path}' are damaged: '{name}' is no {what}")


def _replace(into: list[Record], rows: Iterable[Record], names: tuple[str, ...]) -> None:
    for row in rows:
        key = [row.get(name) for name in names]
        into[:] = [r for r in into if [r.get(name) for name in names] != key]
        into.append(row)
