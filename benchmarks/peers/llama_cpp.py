"""llama.cpp through its own ``llama-batched-bench``: flash attention on, caches f16, q8_0 and q4_0."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from peers.case import Case, Measurement, PeerFailed
from peers.install import Installation
from peers.model import gguf_weights
from peers.repack import repack_flags

KV_DTYPES = ("f16", "q8_0", "q4_0")

_CELLS = 256
"""llama.cpp rounds a sequence's room up to a multiple of this many tokens."""


@dataclass(frozen=True)
class LlamaCpp:
    """One cache dtype (keys and values alike) and one GGUF file, ``source`` or what was made of it.

    The prompt is computed once and copied into every sequence's own cache (``-pps`` with a cache that is not unified),
    so a decode step reads ``batch`` caches as it would in service while the prefill figure is one sequence's.
    """

    place: Installation
    source: Path
    gguf: Path
    kv_dtype: str
    weights: str
    system: str = "llama.cpp"

    def prepare(self) -> None:
        """The F16 file, where that is what is measured."""
        if self.gguf == f16_path(self.place, self.source):
            f16_weights(self.place, self.source)

    def start(self, threads: int) -> list[str]:
        return self.command(Case(1, 16, 1, threads))

    def command(self, case: Case) -> list[str]:
        tokens = case.context + case.new_tokens + 1
        room = case.batch * -(-tokens // _CELLS) * _CELLS
        options = {
            "-m": self.gguf,
            "-c": room,
            "-npp": case.context,
            "-ntg": case.new_tokens,
            "-npl": case.batch,
            "-t": case.threads,
            "-tb": case.threads,
            "-fa": "on",
            "-ctk": self.kv_dtype,
            "-ctv": self.kv_dtype,
            "--output-format": "jsonl",
        }
        flags = [str(part) for option in options.items() for part in option]
        return [str(self.place.llama_tool("llama-batched-bench")), *flags, "-pps", "-no-kvu", *repack_flags(self.gguf)]

    def parse(self, case: Case, output: str) -> Measurement:
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"n_kv_max"')]
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} result lines")
        row = rows[0]
        if (row["pp"], row["pl"], row["tg"]) != (case.context, case.batch, case.new_tokens):
            raise ValueError(f"another case was measured: {row}")
        return Measurement(row["speed_pp"], row["speed_tg"], prefill_sequences=1)


def f16_path(place: Installation, gguf: Path) -> Path:
    """Where :func:`f16_weights` puts its file."""
    return place.directory / f"{gguf.stem}.F16.gguf"


def f16_weights(place: Installation, gguf: Path) -> Path:
    """The same weights, dequantized to F16 by ``llama-quantize``; made on first use."""
    target = f16_path(place, gguf)
    if not target.exists():
        part = target.with_suffix(".part")
        command = [str(place.llama_tool("llama-quantize")), "--allow-requantize", str(gguf), str(part), "F16"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerFailed(f"{' '.join(command)} ended with status {done.returncode}\n{done.stderr[-1000:]}")
        part.rename(target)
    return target


def variants(place: Installation, gguf: Path) -> list[LlamaCpp]:
    """Every cache dtype with F16 weights and with the file's own weights."""
    files = {"F16": f16_path(place, gguf), gguf_weights(gguf): gguf}
    return [LlamaCpp(place, gguf, file, dtype, weights) for weights, file in files.items() for dtype in KV_DTYPES]
