"""What is measured: one case, one measurement, and what an adapter must say about its engine."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

_PAUSE, _LOOKS = 0.1, 5
"""Seconds between two looks whether a process has ended; at every fifth its children's memory is counted too."""


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
    """Tokens per second of all sequences together; ``prefill_sequences`` is how many prompts the prefill figure had,
    ``peak_rss_bytes`` of the process and its children together."""

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

    def prepare(self) -> None:
        """Make the files that the engine needs and that are not there yet. Raises ``PeerFailed``."""

    def start(self, threads: int) -> list[str]:
        """A command line that loads the model, answers a few tokens and ends."""

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
    done = _run(peer, peer.command(case), str(case), timeout)
    try:
        found = peer.parse(case, done.output)
    except (ValueError, KeyError, IndexError) as error:
        raise PeerFailed(
            f"{label(peer)} at {case}: {error!r} in its output: {shlex.join(done.command)}\n{done.tail}"
        ) from error
    return replace(found, peak_rss_bytes=done.peak, wall_s=done.wall)


def measure_start(peer: Peer, threads: int, timeout: float) -> float:
    """Seconds from the command to the end of a process that only answers a few tokens. Raises ``PeerFailed``."""
    return _run(peer, peer.start(threads), "the start", timeout).wall


@dataclass(frozen=True)
class _Done:
    """A process that ended well; ``tail`` is the end of what it wrote, ``peak`` in bytes."""

    command: list[str]
    output: str
    tail: str
    peak: int
    wall: float


def _run(peer: Peer, command: list[str], what: str, timeout: float) -> _Done:
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
        raise PeerFailed(f"{label(peer)} at {what} {reason}: {shlex.join(command)}\n{tail}")
    return _Done(command, said, tail, peak, wall)


def _wait(pid: int, timeout: float) -> tuple[int, int]:
    """Status of a child and the most bytes that it and its own children held at once; all are killed after ``timeout``
    seconds.

    A process' ``ru_maxrss`` begins with what the one that started it held, which is this one: it is taken only where
    the system says nothing better.
    """
    end, together, most = time.monotonic() + timeout, 0, 0
    for look in itertools.count():
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, max(most or usage.ru_maxrss * 1024, together)
        if time.monotonic() > end:
            for process in [*_children(pid), psutil.Process(pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            _, status, usage = os.wait4(pid, 0)
            return status, max(most or usage.ru_maxrss * 1024, together)
        most = max(most, _most_resident(pid))
        if look % _LOOKS == 0 and (children := _children(pid)):
            together = max(together, sum(map(_resident, [psutil.Process(pid), *children])))
        time.sleep(_PAUSE)
    raise AssertionError


def _most_resident(pid: int) -> int:
    """Bytes that a process held at most so far; 0 where Linux's ``/proc`` does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
