"""Results of a benchmark as JSON, a Markdown table and a picture, with the machine's facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from machine import describe, machine_facts

Row = dict[str, Any]


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


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
