"""The laboratory's report: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from kvbits.evaluation.pictures import draw_all
from kvbits.evaluation.verdict import LIMITS
from kvbits.files import write_text

_CAPTIONS = {
    "bits-and-kl": "What the bits buy. Bars: 95 % interval.",
    "by-position": "Is the end of a long context worse?",
    "by-layer": "Error of each layer's attention output when only that layer reads the quantized cache.",
    "tasks": "Log-probability of the right answer that each task loses. Bars: 95 % interval.",
    "passkey": "Passkey, depth by length: nats a token.",
    "needle": "Needle, depth by length: nats a token.",
    "generation": "Free text.",
}


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page for ``document``, as ``kvbits evaluate --json`` has it."""
    write_text(path, render(document))


def render(document: Mapping[str, Any]) -> str:
    """The page as text."""
    results: Sequence[Mapping[str, Any]] = document["results"]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("kvbits.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    tasks = list(dict.fromkeys(name for r in results for name in r.get("tasks", {})))
    pictures = [(_CAPTIONS[name], _inline(figure)) for name, figure in draw_all(results).items()]
    page: str = environment.from_string(source).render(
        document=document, results=results, tasks=tasks, pictures=pictures, limits=LIMITS
    )
    return page


def _inline(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
