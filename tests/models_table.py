"""The table in docs/models.md, made by running a tiny model of every family.

``python tests/models_table.py --write`` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from helpers.families import Facts, facts_of
from helpers.zoo import ZOO

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_BEGIN = "<!-- what follows is written by tests/models_table.py -->"
_LONGEST = 110


def table(found: Iterable[Facts]) -> str:
    """What follows the page's text."""
    facts = sorted(found, key=lambda facts: facts.family)
    runs = [f for f in facts if not f.reason]
    lines = [
        "",
        f"## {len(runs)} that run",
        "",
        "| architecture | attention | CPU | GPU | `generate` |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| `{f.family}` | {f.parts} | {f.cpu} | {f.gpu} | {f.cache} |" for f in runs]
    refused = [f for f in facts if f.reason]
    lines += ["", f"## {len(refused)} that are refused", "", "| architecture | what the error says |", "|---|---|"]
    lines += [f"| `{f.family}` | {_short(f.reason)} |" for f in refused]
    return "\n".join([*lines, ""])


def page_with(found: Iterable[Facts]) -> str:
    """The page with the table of ``found``."""
    text, begin, _ = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    assert begin, PAGE
    return f"{text}{begin}\n{table(found)}"


def _short(reason: str) -> str:
    reason = reason.replace("|", "/")
    return reason if len(reason) <= _LONGEST else f"{reason[: reason.rindex(' ', 0, _LONGEST)]} ..."


if __name__ == "__main__":
    page = page_with(facts_of(family) for family in ZOO)
    if "--write" in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)
