"""A pool under real traffic: a discrete-event simulation of the scheduler and the page manager.

The rules are the engine's (:mod:`kvbits.engine.scheduler`): every running sequence decodes in every step, the rest of
the token budget goes to prompts in order of arrival; a request is admitted when the frames of all its tokens and of its
open page are there besides a small watermark; when frames run out, the newest gives its own back and is computed
again. Time advances from event to event (arrival, prompt stored, answer complete, frames short), many steps at once;
step times come from :class:`kvbits.planning.timing.StepTime`. Differences from the engine: a prompt's frames are taken
when it is admitted, prompts are shared in blocks of 512 tokens, and pages of answers are not shared.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvbits.codecs import PoolLayout
from kvbits.config import PAGE_TOKENS
from kvbits.planning.outcome import Outcome, Served
from kvbits.planning.shared import SimulatedPool
from kvbits.planning.timing import StepTime
from kvbits.planning.trace import BLOCK_TOKENS, Arrival


@dataclass(frozen=True)
class Limits:
    """The engine's options: most sequences at once, token budget of a step, one frame in ``watermark`` kept free."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    watermark: int = 100


@dataclass
class _Request:
    """One request; ``order`` is its place in the trace, ``stored`` the tokens that the cache holds or will hold."""

    order: int
    arrival: Arrival
    answer: int
    served: Served
    done: int = 0
    stored: int = 0
    prefill: int = 0
    shared: list[int] = field(default_factory=list)
    private: int = 0

    @property
    def tokens(self) -> int:
        """Tokens to store before the next one can be sampled."""
        return self.arrival.prompt + self.done


def simulate(
    trace: Sequence[Arrival],
    layout: PoolLayout,
    num_frames: int,
    longest: int,
    step: StepTime,
    limits: Limits | None = None,
    load: float = 1.0,
    progress: Callable[[int], None] = lambda requests: None,
) -> Outcome:
    """Serve ``trace``, its arrivals ``load`` times as dense, from a pool of ``num_frames`` frames.

    ``longest`` is what one sequence can store. A request whose prompt is longer is refused; an answer that would grow
    beyond it is cut. ``progress`` is told of requests that ended.
    """
    limits = limits or Limits()
    return _Simulation(trace, layout, num_frames, longest, step, limits, load, progress).run()


class _Simulation:
    def __init__(
        self,
        trace: Sequence[Arrival],
        layout: PoolLayout,
        num_frames: int,
        longest: int,
        step: StepTime,
        limits: Limits,
        load: float,
        progress: Callable[[int], None],
    ) -> None:
        self.pool = SimulatedPool(num_frames, layout, share=True)
        self.step, self.limits, self.progress = step, limits, progress
        self.time = 0.0
        self.served = [Served(a.time / load, a.prompt, 0) for a in trace]
        self.coming = [
            _Request(i, a, min(max(a.answer, 1), longest - a.prompt + 1), s)
            for i, (a, s) in enumerate(zip(trace, self.served, strict=True))
        ]
        self.coming = [r for r in self.coming if r.arrival.prompt <= longest][::-1]
        progress(len(trace) - len(self.coming))
        self.waiting: list[tuple[int, _Request]] = []
        self.running: list[_Request] = []
        self.outcome = Outcome(self.served, num_frames)

    def run(self) -> Outcome:
        while self.coming or self.waiting or self.running:
            self._arrive()
            self._admit()
            if self.running:
                self._advance()
            else:
                assert self.coming, "a request that fits alone was not admitted to an empty pool"
                self.time = max(self.time, self.coming[-1].served.arrived)
        self.outcome.seconds = self.time
        return self.outcome

    def _arrive(self) -> None:
        while self.coming and self.coming[-1].served.arrived <= self.time:
            request = self.coming.pop()
            heapq.heappush(self.waiting, (request.order, request))

    def _admit(self) -> None:
        budget = self._budget() - sum(r.prefill for r in self.running)
        while self.waiting and len(self.running) < self.limits.max_num_seqs and budget > 0:
            request = self.waiting[0][1]
            if not self._open(request):
                break
            heapq.heappop(self.waiting)
            budget -= request.prefill
        self.outcome.queue(self.time, len(self.waiting), len(self.running))

    def _budget(self) -> int:
        """Prompt tokens of a step."""
        decodes = sum(1 for r in self.running if not r.prefill)
        return max(self.limits.max_num_batched_tokens - decodes, PAGE_TOKENS)

    def _open(self, request: _Request) -> bool:
        pool = self.pool
        found = pool.match(request.arrival.blocks, request.tokens)
        blocks = request.arrival.blocks[:found]
        own = pool.layout.frames_of(request.tokens) - (pool.frames_of_blocks(0, found) if found else 0)
        spare = pool.num_frames // self.limits.watermark if self.running else 0
        if own + spare > pool.available - pool.idle_among(blocks):
            return False
        pool.use(blocks)
        pool.take(own)
        request.shared, request.private = list(blocks), own
        request.prefill = request.tokens - found * BLOCK_TOKENS
        request.stored = request.tokens
        self.outcome.admit(request.served, self.time, found * BLOCK_TOKENS, request.prefill)
        # in order of arrival: the newest is preempted first
        place = next((i for i, r in enumerate(self.running) if r.order > request.order), len(self.running))
        self.running.insert(place, request)
        return True

    def _advance(self) -> None:
        """Run as many steps as nothing can happen in, then let it happen."""
        while True:
            decodes = [r for r in self.running if not r.prefill]
            prefills = [r for r in self.running if r.prefill]
            stored = np.array([r.stored for r in decodes], dtype=np.int64)
            budget = self._budget()
            steps = min((r.answer - r.done for r in decodes), default=1 << 30)
            if prefills:
                steps = min(steps, max(1, prefills[0].prefill // budget))
            steps = self._fitting(stored, steps)
            if steps:
                break
            # the freed frames go to the others first: nothing is admitted before they have stepped
            self._preempt(self.running[-1])
        backlog = sum(r.prefill for r in prefills)
        tokens = min(backlog, budget)
        seen = prefills[0].stored - prefills[0].prefill + tokens / 2 if prefills else 0.0
        seconds = self.step.seconds(len(decodes), float(stored.sum()) + len(decodes) * steps / 2, tokens, seen)
        if self.coming and not self.waiting and len(self.running) < self.limits.max_num_seqs:
            until = self.coming[-1].served.arrived - self.time
            steps = max(1, min(steps, int(until / seconds) + 1))
        self.time += seconds * steps
        self.outcome.steps += steps
        self.pool.take(int(self._frames(stored + steps).sum() - self._frames(stored).sum()))
        for request in decodes:
            request.private += self._more(request.stored, steps)
            request.stored += steps
            self._sampled(request, steps)
        self._prefill(prefills, budget * steps)
        self.outcome.hold(self.time, self.pool.held)

    def _fitting(self, stored: NDArray[np.int64], steps: int) -> int:
        """The most steps, up to ``steps``, whose pages fit."""
        have = self.pool.available + int(self._frames(stored).sum())

        def fits(count: int) -> bool:
            return int(self._frames(stored + count).sum()) <= have

        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _frames(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        layout = self.pool.layout
        full = stored // PAGE_TOKENS
        extra = layout.first_frames - layout.sealed.frames
        return full * layout.sealed.frames + extra * (full > 0) + layout.open.frames

    def _more(self, stored: int, steps: int) -> int:
        frames_of = self.pool.layout.frames_of
        return frames_of(stored + steps) - frames_of(stored)

    def _prefill(self, prefills: list[_Request], tokens: int) -> None:
        for request in prefills:
            part = min(tokens, request.prefill)
            tokens -= part
            request.prefill -= part
            full = min(request.stored - request.prefill, request.arrival.prompt) // BLOCK_TOKENS
            new = self.pool.add(request.arrival.blocks[:full])
            request.shared += new
            request.private -= self.pool.size(new)
            if request.prefill:
                return
            self._sampled(request, 1)

    def _sampled(self, request: _Request, tokens: int) -> None:
        if request.done == 0:
            request.served.first_token = self.time
        request.done += tokens
        if request.done >= request.answer:
            request.served.finished, request.served.answer = self.time, request.done
            self._release(request)
            self.progress(1)

    def _preempt(self, request: _Request) -> None:
        self._release(request)
        request.prefill = 0
        request.served.preemptions += 1
        heapq.heappush(self.waiting, (request.order, request))

    def _release(self, request: _Request) -> None:
        self.running.remove(request)
        self.pool.drop(request.shared)
        self.pool.give(request.private)
        request.shared, request.private = [], 0
