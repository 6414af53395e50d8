"""Hugging Face transformers with its own caches: ``DynamicCache`` in bf16, ``QuantizedCache`` with 4-bit quanto."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peers.case import Case, Measurement
from peers.install import Installation
from peers.worker import worker_command, worker_result, worker_start

CACHES = ("bf16", "quanto4")


@dataclass(frozen=True)
class Transformers:
    """One cache class; weights in bf16, dequantized from the GGUF."""

    place: Installation
    gguf: Path
    kv_dtype: str
    weights: str = "bf16"
    system: str = "transformers"

    def prepare(self) -> None:
        """Nothing is needed."""

    def start(self, threads: int) -> list[str]:
        return worker_start(self.command(Case(1, 16, 1, threads)))

    def command(self, case: Case) -> list[str]:
        return worker_command(self.place, "transformers_worker.py", self.gguf, case, {"--cache": self.kv_dtype})

    def parse(self, case: Case, output: str) -> Measurement:
        return worker_result(output, case)


def variants(place: Installation, gguf: Path) -> list[Transformers]:
    """Both caches."""
    return [Transformers(place, gguf, cache) for cache in CACHES]
