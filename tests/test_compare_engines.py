"""benchmarks/compare_engines.py: engines that are scripts of a line, and the memory of one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_compare_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two engines that say figures, and one that fails."""
    module = importlib.import_module("compare_engines")
    case = importlib.import_module("peers.case")

    class Said:
        weights = "F16"

        def __init__(self, system: str, decode: float | None, starts: bool = True) -> None:
            self.system, self.kv_dtype, self._decode, self._starts = system, "q8", decode, starts
            self.prepared = 0

        def prepare(self) -> None:
            self.prepared += 1

        def start(self, threads: int) -> list[str]:
            return [sys.executable, "-c", f"import sys, time; time.sleep(0.3); sys.exit({0 if self._starts else 4})"]

        def command(self, case: Any) -> list[str]:
            child = "subprocess.Popen([sys.executable, '-c', 'import time; b = b\"1\" * (50 << 20); time.sleep(2)'])"
            said = f"import subprocess, sys; a, b = ({child} for _ in '12'); a.wait(), b.wait(); print({self._decode})"
            return [sys.executable, "-c", said if self._decode else "raise SystemExit(3)"]

        def parse(self, asked: Any, output: str) -> Any:
            return case.Measurement(100.0, float(output), asked.batch)

    class Place:
        vllm_python = tmp_path / "none"

        def __init__(self, directory: Path) -> None: ...

        def missing(self) -> list[Path]:
            return []

    peers = {
        "ours": Said("kvbits", 50.0),
        "llama_cpp": Said("llama.cpp", 25.0),
        "openvino_genai": Said("OpenVINO GenAI", None),
        "vllm_cpu": Said("vLLM", 10.0, starts=False),
    }
    for name in (*peers, "transformers_cache"):
        found = [peers[name]] if name in peers else []
        monkeypatch.setattr(getattr(module, name), "variants", lambda *_, found=found: found)
    monkeypatch.setattr(module, "Installation", Place)
    monkeypatch.setattr(module, "read_bandwidth", lambda threads: 1e9)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    options = ("--case", "2x64", "--repeats", "2", "--gguf", str(gguf), "--json", str(tmp_path / "r.json"))
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *options])
    module.main()
    document = json.loads((tmp_path / "r.json").read_text())
    assert [(r["system"], r["decode_tokens_per_s"], r["repeats"]) for r in document["rows"]] == [
        ("kvbits", 50.0, 2), ("llama.cpp", 25.0, 2)
    ]  # fmt: skip
    assert [f["system"] for f in document["failures"]] == ["OpenVINO GenAI"]
    assert [f["system"] for f in document["no_start"]] == ["vLLM"]
    assert [peer.prepared for peer in peers.values()] == [1, 1, 1, 1]
    for row in document["rows"]:
        assert row["ready_s"] >= 0.3
        assert row["peak_rss_bytes"] > 100 << 20, "children count together"
    said = (tmp_path / "r.md").read_text()
    assert "## Not measured" in said
    assert f"- kvbits:q8:F16, start: `{sys.executable}" in said
    assert (tmp_path / "r.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process' own peak is not told")
def test_what_the_benchmark_itself_holds_is_not_the_engine_s() -> None:
    case = importlib.import_module("peers.case")
    held = bytearray(400 << 20)
    held[::4096] = b"x" * len(held[::4096])
    code = "x = bytearray(60 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(1)"
    process = subprocess.Popen([sys.executable, "-c", code])
    status, peak = case._wait(process.pid, 30)
    process.returncode = status
    assert status == 0
    assert 60 << 20 < peak < 200 << 20
