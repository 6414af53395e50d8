"""What is measured: one case, one measurement, and what an adapter must say about its engine."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``context`` tokens, then ``new_tokens`` timed decode steps of all of them."""

    batch: int
    context: int
    new_tokens: int
    threads: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.context}"


@dataclass(frozen=True)
class Measurement:
    """Tokens per second of all sequences together; ``prefill_sequences`` is how many prompts the prefill figure had."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_sequences: int
    peak_rss_bytes: int = 0
    wall_s: float = 0.0


class Peer(Protocol):
    """One engine with one cache dtype and one kind of weights."""

    @property
    def system(self) -> str:
        """Name of the engine."""

    @property
    def kv_dtype(self) -> str:
        """The cache's dtype in the engine's own words."""

    @property
    def weights(self) -> str:
        """What the linear layers' weights are."""

    def command(self, case: Case) -> list[str]:
        """The whole command line; one process measures one case."""

    def parse(self, case: Case, output: str) -> Measurement:
        """Read the process's standard output."""


class PeerFailed(Exception):
    """An engine ended with an error, took too long or said nothing that its adapter can read."""


def label(peer: Peer) -> str:
    """For example ``llama.cpp:q8_0:F16``; also what ``--systems`` matches."""
    return f"{peer.system}:{peer.kv_dtype}:{peer.weights}"


def measure(peer: Peer, case: Case, timeout: float) -> Measurement:
    """Run the engine once. Raises ``PeerFailed`` with the end of what it wrote."""
    command = peer.command(case)
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory, "output"), Path(directory, "errors")
        begin = time.perf_counter()
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            status, peak = _wait(process.pid, timeout)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begin
        said = output.read_text(errors="replace")
        tail = (said[-600:] + "\n" + errors.read_text(errors="replace")[-1200:]).strip()
    if process.returncode != 0:
        reason = f"took more than {timeout:.0f} s" if wall > timeout else f"ended with status {process.returncode}"
        raise PeerFailed(f"{label(peer)} at {case} {reason}: {shlex.join(command)}\n{tail}")
    try:
        found = peer.parse(case, said)
    except (ValueError, KeyError, IndexError) as error:
        raise PeerFailed(f"{label(peer)} at {case}: {error!r} in its output: {shlex.join(command)}\n{tail}") from error
    return Measurement(found.prefill_tokens_per_s, found.decode_tokens_per_s, found.prefill_sequences, peak, wall)


def _wait(pid: int, timeout: float) -> tuple[int, int]:
    """Status and greatest resident size (bytes) of a child; killed after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage.ru_maxrss * 1024
        if time.monotonic() > end:
            os.kill(pid, 9)
            _, status, usage = os.wait4(pid, 0)
            return status, usage.ru_maxrss * 1024
        time.sleep(0.1)
