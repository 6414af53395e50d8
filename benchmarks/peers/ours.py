"""kvbits itself, through its own command line as a user would run it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from peers.case import Case, Measurement

KV_DTYPES = ("bf16", "int8", "int4")
DEFAULT_WEIGHTS = "auto"
PROGRAM = Path(sys.executable).with_name("kvbits")


@dataclass(frozen=True)
class KVBits:
    """One cache dtype and one kind of weights; ``result`` is a file that the command writes and ``parse`` reads."""

    gguf: Path
    kv_dtype: str
    weights: str
    result: Path
    system: str = "kvbits"

    def prepare(self) -> None:
        """Nothing is needed."""

    def start(self, threads: int) -> list[str]:
        options = ["--kv-cache-dtype", self.kv_dtype, "--weights", self.weights, "--threads", str(threads)]
        return [str(PROGRAM), "generate", str(self.gguf), "--prompt", "One", "--max-tokens", "2", *options]

    def command(self, case: Case) -> list[str]:
        options = {
            "--kv-cache-dtype": self.kv_dtype,
            "--weights": self.weights,
            "--context": case.context,
            "--batch": case.batch,
            "--new-tokens": case.new_tokens,
            "--threads": case.threads,
            "--json": self.result,
        }
        return [str(PROGRAM), "bench", str(self.gguf), *(str(part) for option in options.items() for part in option)]

    def parse(self, case: Case, output: str) -> Measurement:
        if not self.result.exists():
            raise ValueError(f"{self.result} was not written")
        row = json.loads(self.result.read_text())
        self.result.unlink()
        if (row["batch"], row["context"]) != (case.batch, case.context):
            raise ValueError(f"another case was measured: {row['batch']} x {row['context']}")
        return Measurement(row["prefill_tokens_per_s"], row["decode_tokens_per_s"], prefill_sequences=case.batch)


def variants(gguf: Path, weights: list[str], scratch: Path) -> list[KVBits]:
    """Every cache dtype with every kind of weights asked for."""
    return [KVBits(gguf, dtype, kind, scratch / "kvbits.json") for kind in weights for dtype in KV_DTYPES]
