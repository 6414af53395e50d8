"""Where a calibration's results go. No torch."""

from __future__ import annotations

from pathlib import Path

from kvbits.errors import ConfigError

UNFINISHED = "unfinished"
"""Directory in the output in which finished parts are kept until the result is written."""


def check_output(output: Path) -> None:
    """Raise ``ConfigError`` for a directory that holds anything but an unfinished run."""
    if output.is_dir() and not (output / UNFINISHED / "run.json").is_file():
        other = next((path.name for path in sorted(output.iterdir()) if path.name != UNFINISHED), None)
        if other is not None:
            raise ConfigError(f"the directory '{output}' is not empty (it holds {other}); give another one")
