"""Results of a benchmark as JSON, a Markdown table and a picture, with the machine's facts."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from machine import describe, machine_facts
from matplotlib.figure import Figure

Row = dict[str, Any]

COLOURS = ("#3b78b8", "#2a9d6f", "#c8763a", "#8b5fbf", "#b8405e", "#5f6b7a", "#a38a2c", "#2f9aa8")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of ``rows``, columns in the order of the first row's keys."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def write_report(
    title: str, rows: Sequence[Row], path: str | None, facts: Row, label: Sequence[str], figure: str
) -> None:
    """Print the table; with ``path`` write ``path`` (JSON), and beside it the same as ``.md`` and ``.png``.

    ``label`` are the keys that name a bar of the picture, ``figure`` the key of its length.
    """
    machine = machine_facts() | facts
    text = f"# {title}\n\n{describe(machine)}\n\n{table(rows)}\n"
    print(text)
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine, "rows": list(rows)}, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    fig, axes = plt.subplots(figsize=(8, 0.5 + 0.28 * len(rows)))
    axes.barh(
        [" ".join(str(row[key]) for key in label) for row in rows], [row[figure] for row in rows], color="#4477aa"
    )
    axes.invert_yaxis()
    axes.set_xlabel(figure.replace("_", " "))
    axes.set_title(title)
    fig.tight_layout()
    fig.savefig(target.with_suffix(".png"), dpi=120)
    plt.close(fig)


def model_parser(doc: str | None) -> argparse.ArgumentParser:
    """What every script that runs a model takes: the model, KV cache dtypes, and where results go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4"])
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    parser.add_argument("--json", type=Path, metavar="F", help="the table goes beside it as .md, the picture as .png")
    parser.add_argument("--picture", type=Path, metavar="F", help="instead of the picture beside the JSON")


def publish(
    title: str, tables: Mapping[str, Sequence[Row]], facts: Row, args: argparse.Namespace, figure: Figure, notes: str
) -> None:
    """Print the tables; write what :func:`add_output`'s options ask for. ``tables["rows"]`` is the first one."""
    machine = machine_facts() | facts
    settings = ", ".join(f"{key} {_cell(value)}" for key, value in facts.items())
    parts = [f"# {title}", describe(machine), settings, notes]
    for name, rows in tables.items():
        parts += [table(rows)] if name == "rows" else [f"## {name.replace('_', ' ').capitalize()}", table(rows)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    picture = args.picture
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text)
        picture = picture or args.json.with_suffix(".png")
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=130)


def spread(name: str, values: Sequence[float], scale: float = 1.0) -> Row:
    """Median, least and greatest of ``values`` times ``scale``."""
    middle = statistics.median(values)
    return {name: scale * middle, f"{name}_min": scale * min(values), f"{name}_max": scale * max(values)}


def note(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
