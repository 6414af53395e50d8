"""OpenVINO GenAI's continuous batching; reads the GGUF itself and keeps its weights at 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peers.case import Case, Measurement
from peers.install import Installation
from peers.model import gguf_weights
from peers.worker import worker_command, worker_result, worker_start

PRECISIONS = {"bf16": ("bf16", "bf16"), "u8": ("u8", "u8"), "u8/u4": ("u8", "u4"), "u4": ("u4", "u4")}
"""Name of a cache dtype -> precision of the keys, of the values. u8 is the engine's default."""


@dataclass(frozen=True)
class OpenVinoGenAI:
    """One cache precision. All prompts are computed in one step, which this engine does fastest."""

    place: Installation
    gguf: Path
    kv_dtype: str
    weights: str
    system: str = "OpenVINO GenAI"

    def prepare(self) -> None:
        """Nothing is needed."""

    def start(self, threads: int) -> list[str]:
        return worker_start(self.command(Case(1, 16, 1, threads)))

    def command(self, case: Case) -> list[str]:
        key, value = PRECISIONS[self.kv_dtype]
        options = {
            "--key-precision": key,
            "--value-precision": value,
            "--chunk": str(case.batch * case.context),
        }
        return worker_command(self.place, "openvino_worker.py", self.gguf, case, options)

    def parse(self, case: Case, output: str) -> Measurement:
        return worker_result(output, case)


def variants(place: Installation, gguf: Path) -> list[OpenVinoGenAI]:
    """Every cache precision."""
    return [OpenVinoGenAI(place, gguf, dtype, gguf_weights(gguf)) for dtype in PRECISIONS]
