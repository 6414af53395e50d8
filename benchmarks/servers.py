"""Servers that a benchmark starts and ends: ours, and llama-server from the sources that peers/install.py fetches."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from peers.repack import repack_flags

from kvbits.replay.target import Target, find_target

START_SECONDS = 300.0


@dataclass(frozen=True)
class Serving:
    """A server that listens."""

    target: Target
    process: psutil.Process

    def rss(self) -> int:
        """Resident bytes of the process."""
        return int(self.process.memory_info().rss)

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics`` by its name, labels left out and summed."""
        found: dict[str, float] = {}
        for line in httpx.get(self.target.url + "/metrics", timeout=60).text.splitlines():
            if line and line[0] != "#":
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


def kvbits_command(model: str, *flags: str) -> list[str]:
    """``kvbits serve`` of this environment; the port is added by :func:`serving`."""
    return [str(Path(sys.executable).with_name("kvbits")), "serve", model, *flags]


def llama_command(program: Path, gguf: Path, slots: int, context: int, kv_dtype: str, threads: int) -> list[str]:
    """llama-server with ``slots`` places of ``context`` tokens each."""
    flags = {
        "-m": gguf, "-c": slots * context, "-np": slots, "-t": threads, "-tb": threads, "-fa": "on", "-ctk": kv_dtype,
        "-ctv": kv_dtype,
    }  # fmt: skip
    return [str(program), *(str(part) for flag in flags.items() for part in flag), "--no-webui", *repack_flags(gguf)]


@contextmanager
def serving(command: Sequence[str]) -> Iterator[Serving]:
    """Start, wait until healthy, end with SIGTERM. Raises ``RuntimeError`` with the end of what it said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "100000")}
        whole = [*command, "--port", str(port)]
        process = subprocess.Popen(whole, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            end = time.monotonic() + START_SECONDS
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    raise RuntimeError(f"{' '.join(whole)} did not start: {said.read()[-2000:]}")
                time.sleep(0.2)
            yield Serving(find_target(url, None, None), psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark of the server takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="results; F.md beside it")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-cache-memory", default="512MiB", metavar="SIZE")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    return parser
