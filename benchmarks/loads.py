"""What the benchmarks of the server share: prompts of real text, a run with a bar, results that are kept."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from machine import machine_facts
from report import Row, publish, write
from tqdm import tqdm

from kvbits.replay.prompts import BlockText
from kvbits.replay.report import summary
from kvbits.replay.run import LoadShape, Outcome, Prompt, replay
from kvbits.replay.send import Record
from kvbits.replay.target import Target
from kvbits.replay.trace import TraceRequest


def source_of(target: Target, text: Path) -> BlockText:
    """Prompts as token ids of ``target``'s tokenizer. Exits where it lends none."""
    tokens = target.tokenize(text.read_text("utf-8"))
    if tokens is None:
        raise SystemExit(f"{target.url} has no /tokenize")
    return BlockText(tokens)


def run_load(
    target: Target, requests: Sequence[TraceRequest], prompts: Sequence[Prompt], load: LoadShape, label: str
) -> tuple[Outcome, Row]:
    """Send everything with a bar; the records and their summary."""
    with tqdm(total=len(requests), desc=label, unit="req", file=sys.stderr, leave=False) as bar:

        def done(record: Record) -> None:
            bar.update()

        outcome = asyncio.run(replay(target, requests, prompts, load, done))
    return outcome, summary(outcome, {})


@contextmanager
def sampled(look: Callable[[], Row], seconds: float) -> Iterator[list[Row]]:
    """Call ``look`` every so many seconds in a thread of its own; the list fills meanwhile."""
    found: list[Row] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            # A server that is busy, or stopped for a while, answers late or not at all; the next look may be answered.
            with suppress(httpx.HTTPError):
                found.append(look() | {"at": time.perf_counter()})

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join(60)


class Stored:
    """A results file of cases by name. Cases that an earlier run with the same settings has left are not done again."""

    def __init__(self, path: Path, settings: Row) -> None:
        self._path = path
        self.settings = json.loads(json.dumps(settings))
        self.cases: dict[str, Row] = {}
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            if before.get("settings") == self.settings:
                self.cases = before["cases"]

    def has(self, name: str) -> bool:
        """Whether this case is done; says so on stderr."""
        if name in self.cases:
            print(f"{name}: from {self._path}", file=sys.stderr)
        return name in self.cases

    def add(self, name: str, found: Row) -> None:
        """Keep a case, at once."""
        self.cases[name] = found
        write(self._path, {"machine": machine_facts(), "settings": self.settings, "cases": self.cases})

    def finish(self, title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        """Print and write the table."""
        publish(title, {"rows": rows}, self.settings, self._path, notes="\n".join(notes), cases=self.cases)
