"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from kvbits.files import write_text
from kvbits.report.advice import Advice
from kvbits.report.figures import draw_all
from kvbits.report.gather import Gathered

TEMPLATE = "page.html"


def write_page(path: Path, found: Gathered, advice: Advice) -> None:
    """Write the report on ``found`` to ``path``."""
    write_text(path, render(found, advice))


def render(found: Gathered, advice: Advice) -> str:
    """The page as text. Names that come from files are escaped; plots and their library are our own."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("kvbits.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    page: str = environment.from_string(source).render(
        found=found, advice=advice, plots=draw_all(found), library=get_plotlyjs()
    )
    return page
