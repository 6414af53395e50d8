"""``kvbits serve`` as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from helpers.serving import CONTEXT, byte_tokenizer
from helpers.tiny import save, tiny_model

SMALL = ("--dtype", "float32", "--kv-cache-memory", "4MiB", "--threads", "1", "--kv-cache-dtype", "int4")
"""Options for the tiny model."""


def saved_byte_model(directory: Path) -> str:
    """The model of ``helpers.serving.byte_model`` as a directory."""
    return save(tiny_model("llama", vocab_size=259, max_position_embeddings=CONTEXT), directory, byte_tokenizer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(model: str, port: int, *options: str) -> list[str]:
    """The command line that serves ``model``."""
    start = "from kvbits.cli.main import run; run()"
    return [sys.executable, "-c", start, "serve", model, "--port", str(port), *options]


class Process(subprocess.Popen[bytes]):
    """A server whose log goes to a file: a pipe that nobody reads would stop it."""

    def __init__(self, command: list[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        super().__init__(command, stderr=self._log, env=os.environ)

    def said(self) -> str:
        """All that it has written to stderr so far."""
        self._log.seek(0)
        return self._log.read().decode()


@contextmanager
def serving(model: str, *options: str, port: int | None = None) -> Iterator[tuple[Process, str]]:
    """A process that serves ``model`` and its address; it is killed at the end."""
    port = port or free_port()
    process = Process(command(model, port, *options))
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 180
        while True:
            assert process.poll() is None, process.said()
            assert time.monotonic() < end
            try:
                if httpx.get(url + "/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield process, url
    finally:
        process.kill()
        process.wait()


def pool_of(url: str) -> dict[str, int]:
    """Frames of the pool by state, as the server tells them."""
    return dict(httpx.get(url + "/kvbits/state", timeout=30).json()["pool"])


def wait_idle(url: str, seconds: float = 60.0) -> dict[str, int]:
    """Wait until nothing runs; the pool then. No frame may be held."""
    end = time.monotonic() + seconds
    while True:
        state = httpx.get(url + "/kvbits/state", timeout=30).json()
        if state["running"] + state["waiting"] == 0:
            break
        assert time.monotonic() < end, state
        time.sleep(0.1)
    pool = dict(state["pool"])
    assert (pool["open"], pool["sealed"], pool["shared"]) == (0, 0, 0), pool
    assert pool["free"] + pool["cached"] == pool["frames"], pool
    return pool
