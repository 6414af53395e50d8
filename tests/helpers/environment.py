"""An environment apart for other people's clients and tests."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path


def environment(directory: Path, requirements: Path) -> Path:
    """The Python of an environment in ``directory`` that has ``requirements``; made where it is not there."""
    python, stamp = directory / "bin" / "python", directory / ".installed"
    wanted = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(directory, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.write_text(wanted)
    return python
