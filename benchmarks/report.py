"""Results of a benchmark as JSON, a Markdown table and a picture, with the machine's facts."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe, machine_facts
from matplotlib.figure import Figure

from kvbits.files import write_text

Row = dict[str, Any]

COLOURS = ("#3b78b8", "#2a9d6f", "#c8763a", "#8b5fbf", "#b8405e", "#5f6b7a", "#a38a2c", "#2f9aa8")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of ``rows``, columns in the order of the first row's keys."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def write(path: Path, document: Mapping[str, Any], text: str | None = None) -> None:
    """Write ``document`` as JSON, and ``text`` beside it as ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")
    if text is not None:
        path.with_suffix(".md").write_text(text, encoding="utf-8")


def publish(
    title: str,
    tables: Mapping[str, Sequence[Row]],
    facts: Row,
    path: Path | None,
    figure: Figure | None = None,
    notes: str = "",
    picture: Path | None = None,
    shown: Mapping[str, Sequence[Row]] | None = None,
    **more: Any,
) -> None:
    """Print the tables (``tables["rows"]`` is the first one; ``shown``: print and write others than the JSON has).

    With ``path`` (JSON: machine, ``facts`` as settings, tables, ``more``) the text goes beside it as ``.md`` and
    ``figure`` as ``.png``, or to ``picture``.
    """
    machine = machine_facts()
    settings = ", ".join(f"{key.replace('_', ' ')} {_cell(value)}" for key, value in facts.items())
    parts = [f"# {title}", describe(machine), *filter(None, (settings, notes))]
    for name, rows in (shown or tables).items():
        heading = [] if name == "rows" else [f"## {name.replace('_', ' ').capitalize()}"]
        parts += [*heading, table(rows)] if rows else []
    text = "\n\n".join(parts) + "\n"
    print(text)
    if path is not None:
        write(path, {"machine": machine, "settings": facts, **tables, **more}, text)
        picture = picture or path.with_suffix(".png")
    if picture is not None and figure is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=130)


def bars(title: str, rows: Sequence[Row], label: Sequence[str], length: str) -> Figure:
    """A bar for each row: ``label`` are the keys that name it, ``length`` the key of its length."""
    figure = Figure(figsize=(8, 0.5 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [" ".join(str(row[key]) for key in label) for row in rows]
    axes.barh(names, [row[length] for row in rows], color="#4477aa")
    axes.invert_yaxis()
    axes.set_xlabel(length.replace("_", " "))
    axes.set_title(title)
    return figure


def facts_of(args: argparse.Namespace, *left_out: str) -> Row:
    """What a run was asked, but for where its results go; and the number of threads."""
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    asked.setdefault("threads", torch.get_num_threads())
    return {k: v for k, v in asked.items() if k not in ("json", "picture", *left_out)}


def model_parser(doc: str | None) -> argparse.ArgumentParser:
    """What every script that runs a model takes: the model, KV cache dtypes, and where results go."""
    parser = plain_parser(doc)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4"])
    return parser


def plain_parser(doc: str | None) -> argparse.ArgumentParser:
    """What every script takes: where results go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="the table goes beside it as .md, the picture as .png")
    parser.add_argument("--picture", type=Path, metavar="F", help="instead of the picture beside the JSON")
    return parser


def spread(name: str, values: Sequence[float], scale: float = 1.0) -> Row:
    """Median, least and greatest of ``values`` times ``scale``."""
    middle = statistics.median(values)
    return {name: scale * middle, f"{name}_min": scale * min(values), f"{name}_max": scale * max(values)}


def note(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
