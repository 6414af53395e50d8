"""The memory of an engine that benchmarks/compare_engines.py starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process' own peak is not told")
def test_what_the_benchmark_itself_holds_is_not_the_engine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from peers.case import _wait

    held = bytearray(400 << 20)
    held[::4096] = b"x" * len(held[::4096])
    code = "x = bytearray(60 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(1)"
    process = subprocess.Popen([sys.executable, "-c", code])
    status, peak = _wait(process.pid, 30)
    process.returncode = status
    assert status == 0
    assert 60 << 20 < peak < 200 << 20
