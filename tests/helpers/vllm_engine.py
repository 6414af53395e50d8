"""One vLLM engine, run in processes of its own by tests/with_vllm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1] / "with_vllm"


@dataclass(frozen=True)
class Run:
    """What an engine answered, and the tokens that it said its cache holds."""

    rounds: list[dict[str, Any]]
    replayed: list[dict[str, Any]]
    tokens_held: int

    def tokens(self, number: int = 0) -> list[list[list[int]]]:
        """Of one round: prompt by prompt, the tokens of every answer."""
        return [answer["tokens"] for answer in self.rounds[number]["answers"]]

    def counter(self, name: str) -> float:
        """A counter of vLLM's after the last round."""
        return self.rounds[-1]["counters"].get(name, 0)


Engine = Callable[..., Run]


def run_engine(
    directory: Path, model: str, rounds: list[dict[str, Any]], policy: str | None,
    record: dict[str, Any] | None = None, environment: dict[str, str] | None = None, **options: Any,
) -> Run:  # fmt: skip
    """Run ``rounds`` of prompts (token ids) with a policy of kvbits', or (``None``) with vLLM's own cache."""
    given = {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True, "max_num_seqs": 8, **options}
    if policy is not None:
        given["additional_config"] = {"kvbits": {"policy": policy}}
    job: dict[str, Any] = {"engine": {"model": model, **given}, "rounds": rounds}
    if record is not None:
        job["record"] = record
    (directory / "job.json").write_text(json.dumps(job))
    # what threads wait for is decided by vLLM, except that they must not spin where cores are shared
    variables = {**os.environ, "PYTHONPATH": str(HERE), "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
    process = subprocess.run(
        [sys.executable, str(HERE / "engine_process.py"), str(directory / "job.json"), str(directory / "out.json")],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = process.stdout + process.stderr
    errors = "\n".join(line for line in said.splitlines() if "Error" in line)  # its processes' own come far before
    assert process.returncode == 0, f"{errors}\n{said[-2000:]}"
    out = json.loads((directory / "out.json").read_text())
    held = re.search(r"KV cache size: ([\d,]+) tokens", said)
    assert held is not None, said[-2000:]
    return Run(out["rounds"], out["replayed"], int(held.group(1).replace(",", "")))
