"""Mixed load on a server process: every page comes back, memory stays, signals end it cleanly or at once."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from typing import Any

import httpx
import psutil
import pytest
from helpers.mixed import Mixed
from helpers.process import SMALL, free_port, saved_byte_model, serving, wait_idle

FLAT = 0.05
"""Most that resident memory may grow from the second quarter of the soak to the last."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_byte_model(tmp_path_factory.mktemp("model"))


class Busy:
    """A mixed load in a thread of its own, on a server that may go away."""

    def __init__(self, url: str) -> None:
        self.mixed = Mixed(url, 150)
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        self.mixed.run(3.0, 8)

    def __enter__(self) -> Busy:
        self._thread.start()
        time.sleep(1.5)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "a client still waits for a server that is gone"


def test_mixed_load_with_cancels_then_signals(model: str) -> None:
    options = (*SMALL, "--max-num-seqs", "6", "--max-queue", "40", "--drain-timeout", "1")
    port = free_port()
    with serving(model, *options, port=port) as (process, url):
        with Busy(url) as busy:
            process.kill()
            assert process.wait(20) == -signal.SIGKILL
        # Everybody was told, by the connection's end.
        assert busy.mixed.faults
    # Nothing of it stands in the way of the next one.
    with serving(model, *options, port=port) as (process, url):
        mixed = Mixed(url, 150)
        mixed.run(3.0, 10)
        assert not mixed.faults, mixed.faults[:5]
        assert mixed.done["cancelled"] > 3
        assert sum(mixed.done.values()) > 30
        wait_idle(url)
        with Busy(url):
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        said = process.said()
        assert '"frames_held": 0' in said
        assert "Traceback" not in said


@pytest.mark.soak
def test_a_long_mixed_load(request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--soak-minutes")
    name = request.config.getoption("--soak-model")
    options = (
        "--kv-cache-dtype",
        "int4",
        "--kv-cache-memory",
        "96MiB",
        "--max-num-seqs",
        "16",
        "--log-level",
        "warning",
    )
    with serving(name, *options) as (process, url):
        watched = psutil.Process(process.pid)
        samples: list[int] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(minutes * 60 / 400):
                samples.append(watched.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        mixed = Mixed(url, 1500, seed=7)
        mixed.run(minutes * 60, 12)
        ended.set()
        watcher.join(60)
        pool = wait_idle(url, 300)
        state = httpx.get(url + "/kvbits/state").json()
    for kind, count in sorted(mixed.done.items()):
        print(f"{count:7,} {kind}")
    quarter = len(samples) // 4
    early, late = (statistics.median(part) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    print(
        f"resident: {early / 2**20:,.0f} MiB in the second quarter, {late / 2**20:,.0f} MiB in the last "
        f"({100 * (late / early - 1):+.1f} %); {state['preemptions']} preemptions; at the end {pool['free']} frames "
        f"are free and {pool['cached']} cached of {pool['frames']}"
    )
    assert not mixed.faults, mixed.faults[:5]
    assert mixed.done["cancelled"] > minutes
    assert late <= early * (1 + FLAT)
