"""Faults that are put into an engine at random, and the record of whom each of them may cost its answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvbits.engine.batch import StepBatch
from kvbits.engine.engine import Engine
from kvbits.engine.speculation.by_model import ModelProposer

_CHANCE = {"model": 0.01, "draft": 0.03, "schedule": 0.001, "commit": 0.001, "load": 0.05, "save": 0.003}


class Trouble(Exception):
    """What is raised."""


class BadMatcher:
    """A grammar's place where everything is allowed, until its parser fails."""

    finished = False

    def __init__(self, after: int, told: bool) -> None:
        self._left = after
        self._told = told

    def allowed(self) -> torch.Tensor:
        if not self._told and self._left == 0:
            raise Trouble("a matcher that was asked")
        return torch.ones(259, dtype=torch.bool)

    def accept(self, token: int) -> None:
        if self._told and self._left == 0:
            raise Trouble("a matcher that was told")
        self._left -= 1


class BadGrammar:
    def __init__(self, after: int, told: bool) -> None:
        self._after, self._told = after, told

    def start(self) -> BadMatcher:
        return BadMatcher(self._after, self._told)


class Mischief:
    """Wraps the parts of ``engine``; ``blamed`` are the sequences that were alone when something failed."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.blamed: set[int] = set()
        self.count: dict[str, int] = dict.fromkeys(_CHANCE, 0)
        self._engine = engine
        self._rng = rng
        self._phase = ""
        engine.scheduler.schedule = self._during("schedule", engine.scheduler.schedule)
        engine.scheduler.ahead = self._during("schedule", engine.scheduler.ahead)
        engine._commit = self._during("commit", engine._commit)
        for name in ("open", "restore", "reserve", "frames_needed"):
            setattr(engine.pages, name, self._planning(getattr(engine.pages, name)))
        engine.pages.commit = self._committing(engine.pages.commit)
        runner = engine._runner
        runner.run = self._running(runner.run, main=True)
        proposer = None if engine.speculator is None else engine.speculator._proposer
        if isinstance(proposer, ModelProposer) and proposer._runner is not runner:
            proposer._runner.run = self._running(proposer._runner.run, main=False)
        elif proposer is not None and not isinstance(proposer, ModelProposer):
            proposer.propose = self._proposing(proposer.propose)
        tier = engine.pages._cache.tier
        if tier is not None:
            tier._mover.load = self._loading(tier._mover.load)
            tier._mover.save = self._saving(tier._mover.save)

    def _strikes(self, kind: str) -> bool:
        if self._rng.random() >= _CHANCE[kind]:
            return False
        self.count[kind] += 1
        return True

    def _during(self, phase: str, plain: Callable) -> Callable:
        def run(*args: Any) -> Any:
            with self._in(phase):
                return plain(*args)

        return run

    @contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        self._phase = phase
        try:
            yield
        finally:
            self._phase = ""

    def _planning(self, plain: Callable) -> Callable:
        def run(*args: Any, **options: Any) -> Any:
            if self._phase == "schedule" and self._strikes("schedule"):
                suspect = self._engine.scheduler.suspect()
                if suspect is not None:
                    self.blamed.add(suspect.seq_id)
                raise Trouble("while planning")
            return plain(*args, **options)

        return run

    def _committing(self, plain: Callable) -> Callable:
        def run(seq_id: int, tokens: Any) -> None:
            if self._phase == "commit" and self._strikes("commit"):
                self.blamed.add(seq_id)
                raise Trouble("while recording")
            plain(seq_id, tokens)

        return run

    def _running(self, plain: Callable, main: bool) -> Callable:
        def run(batch: StepBatch) -> torch.Tensor:
            kind = "draft" if batch.layout.draft or not main else "model"
            if not self._strikes(kind):
                return plain(batch)
            pages = self._engine.pages
            if kind == "model" and len(batch.layout.starts) == 1:
                self.blamed.update(s for s in pages.sequences() if pages.reserved(s))
            if self._rng.random() < 0.5:
                plain(batch)
            raise Trouble(f"in the {kind}")

        return run

    def _proposing(self, plain: Callable) -> Callable:
        def run(candidates: Any) -> Any:
            if self._strikes("draft"):
                raise Trouble("while guessing")
            return plain(candidates)

        return run

    def _loading(self, plain: Callable) -> Callable:
        def run(slot: int, frame: int, checksum: bytes) -> bool:
            if self._strikes("load"):
                if self._rng.random() < 0.5:
                    raise Trouble("while a page came back")
                return plain(slot, frame, b"another")
            return plain(slot, frame, checksum)

        return run

    def _saving(self, plain: Callable) -> Callable:
        def run(frame: int, slot: int) -> bytes:
            if self._strikes("save"):
                raise Trouble("while a page was put away")
            return plain(frame, slot)

        return run
