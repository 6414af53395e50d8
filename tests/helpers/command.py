"""``kvbits`` in this process: its exit status, and what it says of a mistake."""

from __future__ import annotations

import pytest

from kvbits.cli.main import run


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        run([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    code = status(*arguments)
    error = capsys.readouterr().err
    # Besides: what is loaded, and what the KV cache dtype loses.
    lines = [line for line in error.splitlines() if not line.startswith("Loading ") and " on this model" not in line]
    assert code == 2, error
    assert len(lines) == 1, error
    assert lines[0].startswith("kvbits: error: ")
    assert "Traceback" not in error
    return lines[0]
