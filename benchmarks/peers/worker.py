"""How a worker script, run by the peers' own interpreter, is called and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from peers.case import Case, Measurement
from peers.install import Installation


def worker_command(
    place: Installation, script: str, model: Path, case: Case, options: Mapping[str, str], python: Path | None = None
) -> list[str]:
    """Command line of ``script`` (in workers/) for one case; ``python`` instead of the peers' common one."""
    shared = {
        "--model": str(model),
        "--batch": str(case.batch),
        "--context": str(case.context),
        "--new-tokens": str(case.new_tokens),
        "--threads": str(case.threads),
    }
    flags = [part for option in {**shared, **options}.items() for part in option]
    return [str(python or place.python), str(Path(__file__).parent / "workers" / script), *flags]


def worker_start(command: list[str]) -> list[str]:
    """The same worker, only until it has answered its first short prompt."""
    return [*command, "--start-only"]


def worker_result(output: str, case: Case) -> Measurement:
    """The last line that is a JSON object. Raises ``ValueError`` or ``KeyError`` when it is not there."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError("no result")
    row = json.loads(lines[-1])
    return Measurement(row["prefill_tokens_per_s"], row["decode_tokens_per_s"], prefill_sequences=case.batch)
