"""The next step's plan and arrays, made while the device still works on the current step.

Only where the next step can be nothing but one more token of each running sequence; which tokens, need not be known for
that. What was made is looked at again when the step begins, and taken back where anything came in between: it never
changes what a step computes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from kvbits.engine.batch import Piece, StepBatch, build
from kvbits.engine.request import Request, RequestStatus
from kvbits.engine.scheduler import ScheduledRequest, Scheduler

log = logging.getLogger(__name__)


class Ahead:
    """Plans of ``scheduler``, one at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._made: tuple[list[ScheduledRequest], StepBatch, int] | None = None

    def make(self) -> None:
        """After what the current step stores was recorded; frames are reserved. What fails here is left to the step."""
        pages = self._scheduler.pages
        try:
            works = self._scheduler.ahead()
            if works:
                batch = build([Piece(w.request.seq_id, w.start, (0,), 1) for w in works], pages)
                self._made = works, batch, pages.moves
        except Exception:
            log.exception("a step could not be planned ahead")
            self._take_back(self._scheduler.running)

    def take(self) -> tuple[list[ScheduledRequest], StepBatch] | None:
        """What was made, with the tokens that have come since; ``None`` where there is none, or it is void."""
        made, self._made = self._made, None
        if made is None:
            return None
        scheduler, (works, batch, moves) = self._scheduler, made
        alive = [r for r in (work.request for work in works) if r.status is RequestStatus.RUNNING and r.remaining == 1]
        same = len(alive) == len(works) == len(scheduler.running) and moves == scheduler.pages.moves
        if not same or scheduler.waiting or scheduler.suspect():
            self._take_back(scheduler.running)
            return None
        for work in works:
            scheduler.charge(work)
        batch.input_ids.copy_(torch.tensor([request.tokens[-1] for request in alive]))
        return works, batch

    def _take_back(self, requests: Sequence[Request]) -> None:
        pages = self._scheduler.pages
        for request in requests:
            if pages.reserved(request.seq_id):
                pages.rollback(request.seq_id)
