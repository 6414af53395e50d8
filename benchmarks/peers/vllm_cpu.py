"""vLLM's CPU engine, where its wheel could be installed, on the file's weights unpacked to 16 bits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peers.case import Case, Measurement, PeerFailed
from peers.install import Installation
from peers.worker import worker_command, worker_result, worker_start

KV_DTYPES = {"bf16": "auto", "fp8": "fp8"}
_CONVERT = """
import pathlib, sys
from kvbits.models.checkpoint import write_checkpoint
write_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]))
"""


@dataclass(frozen=True)
class VllmCpu:
    """One cache dtype; ``gguf``, unpacked to a directory of safetensors."""

    place: Installation
    gguf: Path
    kv_dtype: str
    weights: str = "bf16"
    system: str = "vLLM"

    @property
    def checkpoint(self) -> Path:
        return self.place.directory / f"{self.gguf.stem}.bf16"

    def prepare(self) -> None:
        """Unpack the file, in a process of its own."""
        if not (self.checkpoint / "config.json").exists():
            command = [sys.executable, "-c", _CONVERT, str(self.gguf), str(self.checkpoint)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise PeerFailed(f"{self.gguf} cannot be unpacked for vLLM: {done.stderr[-1000:]}")

    def start(self, threads: int) -> list[str]:
        return worker_start(self.command(Case(1, 16, 1, threads)))

    def command(self, case: Case) -> list[str]:
        options = {"--cache": KV_DTYPES[self.kv_dtype]}
        return worker_command(self.place, "vllm_worker.py", self.checkpoint, case, options, self.place.vllm_python)

    def parse(self, case: Case, output: str) -> Measurement:
        return worker_result(output, case)


def variants(place: Installation, gguf: Path) -> list[VllmCpu]:
    """Both caches; none where vLLM is not installed."""
    return [VllmCpu(place, gguf, dtype) for dtype in KV_DTYPES] if place.vllm_python.exists() else []
