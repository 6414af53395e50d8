"""``kvbits report``: everything that was measured and planned for a model, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbits.cli.extras import require
from kvbits.cli.output import writable
from kvbits.errors import ConfigError


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="JSON files of evaluate, plan and bench (--json), and directories of policies."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    sessions: Annotated[int, typer.Option(min=1, metavar="N", help="Sessions that the recommendation must hold.")] = 1,
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Of this context; one that was planned. Default: the first.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: tables, interactive plots, and a recommendation with its reasons."""
    require("report")
    from kvbits.report.gather import gather

    found = gather(results)
    planned = {c["context"] for plan in found.plans for s in plan["schemes"] for c in s["contexts"]}
    if context is not None and context not in planned:
        listed = ", ".join(map(str, sorted(planned))) or "none"
        raise ConfigError(f"a context of {context} tokens was not planned; planned: {listed}")
    writable(output)
    from kvbits.report.advice import advise
    from kvbits.report.page import write_page

    advice = advise(found, sessions, context)
    write_page(output, found, advice)
    print(f"{found.model}: {'use ' + advice.dtype if advice.dtype is not None else 'no recommendation'}")
    for reason in advice.reasons:
        print(f"  {reason}")
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")
