"""A pool under real traffic: a discrete-event simulation of the scheduler and the page manager.

The rules are the engine's (:mod:`kvbits.engine.scheduler`): every running sequence decodes in every step, the rest of
the token budget goes to prompts in order of arrival, half of it to those much shorter than the rest of the first; a
request is admitted when the frames of all its tokens and of its open page are there besides a small watermark; when
frames run out, the newest gives its own back and is computed again, from those of its pages that are still there. Time
advances from event to event (arrival, prompt stored, answer complete, frames short), many steps at once; step times
come from :class:`kvbits.planning.timing.StepTime`. Differences from the engine: a prompt's frames are taken when it is
admitted, a trace does not say where a prompt repeats an answer, and what sliding windows still see of a page is each
request's own, found whenever the page is.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvbits.codecs import PoolLayout
from kvbits.config import MIN_PREFILL, OVERTAKEN, PAGE_TOKENS, WATERMARK
from kvbits.planning.outcome import Served, SimulationResult
from kvbits.planning.shared import SimulatedPool
from kvbits.planning.timing import StepTime
from kvbits.traces import BLOCK_TOKENS, Arrival

BLOCK_PAGES = BLOCK_TOKENS // PAGE_TOKENS


@dataclass(frozen=True)
class EngineLimits:
    """The engine's options: most sequences at once, token budget of a step, one frame in ``watermark`` kept free."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    watermark: int = WATERMARK


@dataclass(eq=False)
class _Request:
    """One request; ``order`` is its place in the trace, ``stored`` the tokens that the cache holds or will hold.

    ``pages`` are full and stored; ``shared`` names those that others can find, ``private`` are the frames of the rest.
    """

    order: int
    arrival: Arrival
    answer: int
    served: Served
    done: int = 0
    stored: int = 0
    prefill: int = 0
    pages: int = 0
    shared: list[int] = field(default_factory=list)
    private: int = 0

    @property
    def tokens(self) -> int:
        """Tokens to store before the next one can be sampled."""
        return self.arrival.prompt + self.done

    def name(self, page: int) -> int:
        """The name of its full page ``page``: equal for all that begin with the same blocks, else its own."""
        blocks, block = self.arrival.blocks, page // BLOCK_PAGES
        if block < len(blocks) and (page + 1) * PAGE_TOKENS <= self.arrival.prompt:
            return blocks[block] * BLOCK_PAGES + page % BLOCK_PAGES
        return -(self.order << 32) - page - 1

    def names(self) -> Iterator[int]:
        """The names of its full pages; at least one token is left to compute."""
        return map(self.name, range((self.tokens - 1) // PAGE_TOKENS))


def simulate(
    trace: Sequence[Arrival],
    layout: PoolLayout,
    num_frames: int,
    longest: int,
    step: StepTime,
    limits: EngineLimits | None = None,
    load: float = 1.0,
    progress: Callable[[int], None] = lambda requests: None,
) -> SimulationResult:
    """Serve ``trace``, its arrivals ``load`` times as dense, from a pool of ``num_frames`` frames.

    ``longest`` is what one sequence can store. A request whose prompt is longer is refused; an answer that would grow
    beyond it is cut. ``progress`` is told of requests that ended.
    """
    limits = limits or EngineLimits()
    return _Simulation(trace, layout, num_frames, longest, step, limits, load, progress).run()


class _Simulation:
    def __init__(
        self,
        trace: Sequence[Arrival],
        layout: PoolLayout,
        num_frames: int,
        longest: int,
        step: StepTime,
        limits: EngineLimits,
        load: float,
        progress: Callable[[int], None],
    ) -> None:
        self.pool = SimulatedPool(num_frames, layout)
        self.step, self.limits, self.progress = step, limits, progress
        self.time = 0.0
        self.served = [Served(a.time / load, a.prompt, 0) for a in trace]
        self.coming = [
            _Request(i, a, min(max(a.answer, 1), longest - a.prompt + 1), s)
            for i, (a, s) in enumerate(zip(trace, self.served, strict=True))
        ]
        self.coming = [r for r in self.coming if r.arrival.prompt <= longest][::-1]
        progress(len(trace) - len(self.coming))
        self.waiting: list[_Request] = []
        self.running: list[_Request] = []
        self.outcome = SimulationResult(self.served, num_frames)
        self._blocked: tuple[int, int] | None = None

    def run(self) -> SimulationResult:
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
            self._queue(request)

    def _queue(self, request: _Request) -> None:
        insort(self.waiting, request, key=_order)

    def _admit(self) -> None:
        budget = self._budget()
        prefills = self._prefills()
        if prefills:
            longest = prefills[0].prefill // OVERTAKEN
            short = (r for r in self.waiting if r.tokens <= longest)
            self._start(short, budget // 2 - sum(r.prefill for r in prefills if r.prefill <= longest))
        self._start(iter(self.waiting), budget - sum(r.prefill for r in self.running))
        self.outcome.queue(self.time, len(self.waiting), len(self.running))

    def _start(self, requests: Iterator[_Request], budget: int) -> None:
        """Admit ``requests`` of those that wait, in order, while seats, frames and ``budget`` last."""
        started = []
        while budget > 0 and len(self.running) < self.limits.max_num_seqs:
            request = next(requests, None)
            if request is None or not self._open(request):
                break
            started.append(request)
            budget -= request.prefill
        for request in started:
            self.waiting.remove(request)

    def _prefills(self) -> list[_Request]:
        return [r for r in self.running if r.prefill]

    def _budget(self) -> int:
        """Prompt tokens of a step."""
        decodes = sum(1 for r in self.running if not r.prefill)
        return max(self.limits.max_num_batched_tokens - decodes, MIN_PREFILL)

    def _open(self, request: _Request) -> bool:
        pool = self.pool
        state = (request.order, pool.available)
        if self.running and self._blocked == state:
            return False
        found = pool.match(request.names())
        own = pool.layout.frames_of(request.tokens) - pool.size(found)
        spare = pool.num_frames // self.limits.watermark if self.running else 0
        if own + spare > pool.available - pool.idle_among(found):
            self._blocked = state
            return False
        self._blocked = None
        pool.use(found)
        pool.take(own)
        request.shared, request.private, request.pages = found, own, len(found)
        request.prefill = request.tokens - len(found) * PAGE_TOKENS
        request.stored = request.tokens
        self.outcome.admit(request.served, self.time, len(found) * PAGE_TOKENS, request.prefill)
        insort(self.running, request, key=_order)
        return True

    def _advance(self) -> None:
        """Run as many steps as nothing can happen in, then let it happen."""
        while True:
            decodes = [r for r in self.running if not r.prefill]
            prefills = self._prefills()
            short = [r for r in prefills if r.prefill <= prefills[0].prefill // OVERTAKEN]
            stored = np.array([r.stored for r in decodes], dtype=np.int64)
            budget = self._budget()
            steps = min((r.answer - r.done for r in decodes), default=1 << 30)
            if short:
                steps = min(steps, max(1, short[0].prefill // (budget // 2)))
            elif prefills:
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
        frames_of = self.pool.layout.frames_of
        self.pool.take(int(frames_of(stored + steps).sum() - frames_of(stored).sum()))
        for request in decodes:
            request.private += frames_of(request.stored + steps) - frames_of(request.stored)
            request.stored += steps
            self._seal(request, request.stored)
            self._sampled(request, steps)
        left = self._prefill(short, budget // 2 * steps)
        self._prefill([r for r in prefills if r not in short], (budget - budget // 2) * steps + left)
        self.outcome.hold(self.time, self.pool.held)

    def _fitting(self, stored: NDArray[np.int64], steps: int) -> int:
        """The most steps, up to ``steps``, whose pages fit."""
        frames_of = self.pool.layout.frames_of
        have = self.pool.available + int(frames_of(stored).sum())

        def fits(count: int) -> bool:
            return int(frames_of(stored + count).sum()) <= have

        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _prefill(self, prefills: Iterable[_Request], tokens: int) -> int:
        """Compute ``tokens`` tokens of ``prefills``, in order; returns how many are left over."""
        for request in prefills:
            part = min(tokens, request.prefill)
            tokens -= part
            request.prefill -= part
            self._seal(request, request.stored - request.prefill)
            if request.prefill:
                break
            self._sampled(request, 1)
        return tokens

    def _seal(self, request: _Request, stored: int) -> None:
        """Let others find the pages of ``request`` that ``stored`` tokens complete."""
        layout, full = self.pool.layout, stored // PAGE_TOKENS
        for page in range(request.pages, full):
            name = request.name(page)
            frames = sum(1 if page else g.first_frames for g in layout.groups if g.kept is None)
            if self.pool.add(name, frames):
                request.shared.append(name)
                request.private -= frames
        request.pages = full

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
        self._queue(request)

    def _release(self, request: _Request) -> None:
        self.running.remove(request)
        self.pool.drop(request.shared)
        self.pool.give(request.private)
        request.shared, request.private, request.pages = [], 0, 0


def _order(request: _Request) -> int:
    return request.order
