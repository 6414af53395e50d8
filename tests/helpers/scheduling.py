"""A scheduler with a page manager, and a stand-in for the model that appends numbers."""

from __future__ import annotations

from kvbits.config import MIN_PREFILL
from kvbits.engine.params import SamplingParams
from kvbits.engine.request import FinishReason, Request, RequestStatus
from kvbits.engine.scheduler import Scheduler, SchedulerOutput
from kvbits.pages import PageManager

OPEN = 3


class World:
    """Runs plans: stores what was planned, and appends a token where one is due, until a request has ``length``."""

    def __init__(self, frames: int, max_num_seqs: int = 8, budget: int = 128, caching: bool = True) -> None:
        self.pages = PageManager(frames, OPEN, enable_prefix_caching=caching)
        capacity = (frames - OPEN) * 64 + 63
        self.scheduler = Scheduler(self.pages, capacity, max_num_seqs, budget)
        self.lengths: dict[int, int] = {}
        self.count = 0
        self.order: list[int] = []
        self.exhausted: list[Request] = []

    def add(self, prompt: int, new: int, priority: int = 0, first: int = 0, **options: object) -> Request:
        tokens = list(range(first, first + prompt))
        request = Request(self.count, tokens, SamplingParams(), priority=priority, **options)
        self.count += 1
        self.lengths[request.seq_id] = prompt + new
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput:
        decodes = {r.seq_id for r in self.scheduler.running if r.remaining == 1}
        plan = self.scheduler.schedule()
        self.check(plan, decodes)
        for work in plan.works:
            request = work.request
            end = work.start + work.count
            self.pages.commit(request.seq_id, request.tokens[work.start : end])
            request.computed = end
            if work.samples:
                request.tokens.append(10_000 + len(request.tokens))
                if len(request.tokens) >= self.lengths[request.seq_id]:
                    self.finish(request, FinishReason.STOP)
        for request in plan.exhausted:
            self.exhausted.append(request)
            assert request.seq_id not in self.pages.sequences()
            request.finish(FinishReason.LENGTH)
        self.pages.check()
        return plan

    def finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.remove(request)
        request.finish(reason)
        self.order.append(request.seq_id)

    def check(self, plan: SchedulerOutput, decodes: set[int]) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_num_seqs
        planned = [w.request.seq_id for w in plan.works]
        assert len(set(planned)) == len(planned)
        prefill = sum(w.count for w in plan.works if w.request.seq_id not in decodes)
        # A running sequence that ended for lack of pages leaves its token of the budget to prompts.
        advanced = len(decodes & set(planned))
        assert prefill <= max(scheduler.max_num_batched_tokens - advanced, MIN_PREFILL)
        left = decodes - {r.seq_id for r in [*plan.preempted, *plan.exhausted]}
        assert left <= set(planned), "a running sequence did not get its token"
        ranks = [r.rank for r in scheduler.running]
        assert ranks == sorted(ranks)
        for request in plan.preempted:
            assert request.status is RequestStatus.PREEMPTED
            assert request.computed == 0

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            plan = self.step()
            assert plan.works or plan.exhausted or plan.preempted, "a step without progress"
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.pages.available() == self.pages.num_frames
