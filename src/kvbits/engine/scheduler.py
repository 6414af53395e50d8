"""Who computes what in the next step: continuous batching over a pool of pages. No torch.

Every running sequence that only waits for its next token gets it in every step; the rest of the step's token budget
goes to prompts, in order of rank (priority, then arrival), but prompts much shorter than what is left of the first
may take half of it. A sequence is admitted when the frames of all its tokens
and of its open page are there, besides those already promised to prompts under way and a small watermark. When frames
run out, the sequence of the lowest rank gives its own back and is computed again later, from the prefix cache where
its pages survive; since it keeps its tokens and its random state, the answer does not change.

What this module does not know: logits, text, wall-clock time.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbits.config import MIN_PREFILL, OVERTAKEN, WATERMARK
from kvbits.engine.drafts import DraftRoom
from kvbits.engine.request import Request, RequestStatus
from kvbits.engine.shares import Shares
from kvbits.pages import PageManager


@dataclass(frozen=True)
class ScheduledRequest:
    """``count`` tokens of ``request`` after its ``start`` stored ones, and then the guessed ``draft``.

    The last ``outputs`` rows need logits: those of the draft, the one before it where ``samples`` (the next token can
    be chosen after this work), and every row of a prompt whose log-probabilities are asked for.
    """

    request: Request
    start: int
    count: int
    outputs: int
    samples: bool
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The tokens of all rows."""
        return [*self.request.tokens[self.start : self.start + self.count], *self.draft]


@dataclass
class SchedulerOutput:
    """One step. ``exhausted`` are requests that no longer fit the pool even alone; their frames are already free."""

    works: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    exhausted: list[Request] = field(default_factory=list)


class Scheduler:
    """Queues and the decision of each step.

    ``capacity_tokens`` is what one sequence can store when it has the pool to itself.
    """

    def __init__(
        self, pages: PageManager, capacity_tokens: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.pages = pages
        self.capacity_tokens = capacity_tokens
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.shares = Shares()
        self._blocked: tuple[int, int] | None = None

    def add(self, request: Request) -> None:
        """Queue a request."""
        insort(self.waiting, request, key=_rank)
        self.shares.enter(request.client, request.seq_id)

    def remove(self, request: Request) -> None:
        """Forget a request that ended, wherever it stands, and free its pages."""
        if request in self.running:
            self.running.remove(request)
            self.pages.free(request.seq_id)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.shares.leave(request.client, request.seq_id)

    def decoding(self) -> list[Request]:
        """Running sequences that wait for their next token."""
        return [r for r in self.running if r.remaining == 1]

    def suspect(self) -> Request | None:
        """The request that has the next step to itself."""
        return next((r for r in [*self.running, *self.waiting] if r.suspect), None)

    def schedule(self) -> SchedulerOutput:
        """Reserve frames for the next step and say what it computes."""
        plan = SchedulerOutput()
        scheduled: set[int] = set()
        suspect = self.suspect()
        if suspect is not None:
            self._alone(suspect, plan, scheduled)
            return plan
        given_up, favoured = self._make_way()
        decodes = self._by_seats(self.decoding())
        room = DraftRoom(self.pages, decodes, self.max_num_batched_tokens - len(decodes))
        rows = 0
        for request in decodes:
            if request.status is RequestStatus.RUNNING:
                draft = room.take(request)
                rows += self._advance(request, 1, plan, scheduled, draft) + len(draft)
        budget = max(self.max_num_batched_tokens - rows, min(MIN_PREFILL, self.max_num_batched_tokens))
        # Not before: a running answer may have taken a prompt's pages.
        prefills = self._by_service([r for r in self.running if r.remaining > 1])
        if favoured is None:
            favoured = self._less_served(prefills)
        if favoured is not None and not plan.preempted:
            budget -= self._admit([favoured], budget, plan, scheduled)
        elif prefills:
            budget -= self._overtake(prefills[0], budget // 2, plan, scheduled)
        for request in prefills:
            if budget > 0 and request.status is RequestStatus.RUNNING and request.seq_id not in scheduled:
                budget -= self._advance(request, min(budget, request.remaining), plan, scheduled)
        if not plan.preempted:
            self._admit([r for r in self.waiting if r not in given_up], budget, plan, scheduled)
        plan.preempted += given_up
        return plan

    def ahead(self) -> list[ScheduledRequest]:
        """What the next step computes if it is one more token of each running sequence, before the current step's
        tokens are there; frames are reserved. Nothing where it may be anything else."""
        running, pages = self.running, self.pages
        if self.waiting or pages.states is not None or len(running) > self.max_num_batched_tokens:
            return []
        if any(r.remaining or r.suspect for r in running):
            return []
        if sum(pages.frames_needed(r.seq_id, 1) for r in running) > pages.available():
            return []
        works = [ScheduledRequest(r, r.computed, 1, 1, True) for r in self._by_seats(running)]
        for work in works:
            pages.reserve(work.request.seq_id, 1)
        return works

    def charge(self, work: ScheduledRequest) -> None:
        """Count what a step computes for a client."""
        # A new token counts twice, as in the paper: its step costs more than a prompt token's part of one.
        self.shares.charge(work.request.client, work.count + len(work.draft) + work.samples)

    def _seats(self) -> Counter[str]:
        return Counter(request.client for request in self.running)

    def _by_seats(self, requests: list[Request]) -> list[Request]:
        """Those of clients with few seats first: who comes first may take frames from who comes later."""
        if not self.shares.several:
            return requests
        seats = self._seats()
        return sorted(requests, key=lambda r: (r.priority, seats[r.client], r.seq_id))

    def _by_service(self, requests: list[Request]) -> list[Request]:
        """Those of clients that were served the least first."""
        if not self.shares.several:
            return requests
        return sorted(requests, key=lambda r: (r.priority, self.shares.served(r.client), r.seq_id))

    def _next(self, requests: Sequence[Request]) -> Request:
        """Which of some waiting ``requests`` is admitted first: the least served client's, or where there are more of
        them than free seats, that of the client with the fewest."""
        if not self.shares.several:
            return requests[0]
        scarce = len(requests) > self.max_num_seqs - len(self.running)
        seats = self._seats() if scarce else Counter()
        return min(requests, key=lambda r: (r.priority, seats[r.client], self.shares.served(r.client), r.seq_id))

    def _less_served(self, prefills: Sequence[Request]) -> Request | None:
        """A waiting request of a client that was served less than those of all prompts under way."""
        waiting = [r for r in self.waiting if r.ready] if prefills and self.shares.several else []
        if not waiting:
            return None
        head, first, served = self._next(waiting), prefills[0], self.shares.served
        return head if (head.priority, served(head.client)) < (first.priority, served(first.client)) else None

    def _make_way(self) -> tuple[list[Request], Request | None]:
        """Preempt the newest sequence of the client with the most seats for one that waits and has too few.

        The oldest sequence of a client is never given up, so that long ones end too. Returns what was preempted, and
        for whom.
        """
        waiting = [r for r in self.waiting if r.ready] if self.shares.several else []
        if not waiting:
            return [], None
        head, seats = self._next(waiting), self._seats()
        theirs = [r for r in self.running if r.priority >= head.priority and r.client != head.client]
        rival = max((r.client for r in theirs), key=lambda client: seats[client], default="")
        if seats[rival] - seats[head.client] < 2:
            return [], None
        victims = [r for r in reversed(theirs) if r.client == rival][: seats[rival] - 1]
        full = len(self.running) >= self.max_num_seqs
        if not victims or not (full or self._frames_for(head, rival, victims)):
            return [], None
        plan = SchedulerOutput()
        self._preempt(victims[0], plan)
        self._blocked = None
        return plan.preempted, head

    def _frames_for(self, head: Request, rival: str, victims: Sequence[Request]) -> bool:
        """Whether ``head`` was refused for lack of frames, and some ``victims`` are enough for it and not too much."""
        if self._blocked is None or self._blocked[0] != head.seq_id:
            return False
        held: Counter[str] = Counter()
        for request in self.running:
            held[request.client] += request.computed
        pages = self.pages
        need = len(head.tokens)
        most = held[rival] - held[head.client] - need
        missing = need - pages.tokens_in(pages.available())
        freed = 0
        for victim in victims:
            freed += victim.computed
            if freed > most:
                return False
            if freed >= missing:
                return True
        return False

    def _overtake(self, first: Request, budget: int, plan: SchedulerOutput, scheduled: set[int]) -> int:
        """Let prompts much shorter than the rest of ``first``'s go before it; returns the tokens planned for them.

        ``first`` keeps half of the step and the frames for it, so it is never delayed by more than a factor of two.
        """
        if self.pages.frames_needed(first.seq_id, min(first.remaining, budget)) > self.pages.available():
            return 0
        longest, used = first.remaining // OVERTAKEN, 0
        for request in [r for r in self.running if r.priority <= first.priority and 1 < r.remaining <= longest]:
            if used < budget and request.status is RequestStatus.RUNNING:
                used += self._advance(request, min(budget - used, request.remaining), plan, scheduled)
        if not plan.preempted:
            short = [r for r in self.waiting if r.priority <= first.priority and len(r.tokens) <= longest]
            used += self._admit(short, budget - used, plan, scheduled)
        return used

    def _alone(self, request: Request, plan: SchedulerOutput, scheduled: set[int]) -> None:
        """A step for one request, which must find out whether it was the one that failed."""
        while request not in self.running and not self._open(request, plan):
            if not self.running:
                self.remove(request)
                plan.exhausted.append(request)
                return
            self._preempt(self.running[-1], plan)
        self._advance(request, min(self.max_num_batched_tokens, request.remaining), plan, scheduled)

    def requeue(self, request: Request) -> None:
        """Let a request start again, wherever a failed step has left it; its pages may hold rows of that step."""
        if request in self.running:
            self.running.remove(request)
        if request.seq_id in self.pages.sequences():
            self.pages.free(request.seq_id)
        if request.status is RequestStatus.RUNNING:
            request.status = RequestStatus.PREEMPTED
            request.preemptions += 1
        request.computed = 0
        if request not in self.waiting:
            self.add(request)

    def _advance(
        self, request: Request, count: int, plan: SchedulerOutput, scheduled: set[int], draft: tuple[int, ...] = ()
    ) -> int:
        """Plan ``count`` tokens of a running request, and ``draft`` after them; returns how many were planned."""
        count = self.pages.chunk(request.seq_id, count)
        if not self._make_room(request, count, plan, scheduled):
            count = self._shortened(request, count)
        if not count:
            alone = self.running == [request]
            if alone or len(request.tokens) > self.capacity_tokens:
                self.remove(request)
                plan.exhausted.append(request)
            elif request.remaining == 1 or not scheduled:
                self._preempt(request, plan)
            return 0
        self.pages.reserve(request.seq_id, count + len(draft), tentative=bool(draft))
        scheduled.add(request.seq_id)
        work = self._work(request, count, draft)
        plan.works.append(work)
        self.charge(work)
        return count

    @staticmethod
    def _work(request: Request, count: int, draft: tuple[int, ...]) -> ScheduledRequest:
        whole = request.params.prompt_logprobs is not None and request.num_output == 0
        samples = request.computed + count == len(request.tokens)
        outputs = (count if whole else int(samples)) + len(draft)
        return ScheduledRequest(request, request.computed, count, outputs, samples, draft)

    def _make_room(self, request: Request, count: int, plan: SchedulerOutput, scheduled: Iterable[int]) -> bool:
        """Preempt requests of lower rank that this step has not planned yet until ``count`` tokens fit."""
        while self.pages.frames_needed(request.seq_id, count) > self.pages.available():
            victim = self._victim(request, scheduled)
            if victim is None:
                return False
            self._preempt(victim, plan)
        return True

    def _shortened(self, request: Request, count: int) -> int:
        """``count`` tokens cut at the end of the page, where windows then give back what the rest needs; else 0."""
        pages = self.pages
        inside = pages.page_tokens - request.computed % pages.page_tokens
        if not pages.shape.frees or inside >= count:
            return 0
        return inside if pages.frames_needed(request.seq_id, inside) <= pages.available() else 0

    def _victim(self, request: Request, scheduled: Iterable[int]) -> Request | None:
        """Whose frames ``request`` may take; ``None``: it comes last itself."""
        if not self.shares.several:
            last = self.running[-1]
            return None if last is request or last.seq_id in scheduled else last
        seats = self._seats()

        def place(r: Request) -> tuple[int, int, int]:
            return r.priority, seats[r.client], r.seq_id

        others = (r for r in self.running if r.seq_id not in scheduled and place(r) > place(request))
        return max(others, key=place, default=None)

    def _preempt(self, request: Request, plan: SchedulerOutput) -> None:
        self.running.remove(request)
        self.pages.free(request.seq_id)
        request.status = RequestStatus.PREEMPTED
        request.computed = 0
        request.preemptions += 1
        self.add(request)
        plan.preempted.append(request)

    def _admit(self, requests: Iterable[Request], budget: int, plan: SchedulerOutput, scheduled: set[int]) -> int:
        """Start waiting ``requests``, in order, while budget, seats and frames last; returns the tokens planned."""
        used = 0
        left = [r for r in requests if r.ready]
        while left and used < budget and len(self.running) < self.max_num_seqs:
            request = self._next(left)
            left.remove(request)
            if len(request.tokens) > self.capacity_tokens:
                self.remove(request)
                plan.exhausted.append(request)
                continue
            if not self._open(request, plan):
                break
            used += self._advance(request, min(budget - used, request.remaining), plan, scheduled)
        return used

    def _open(self, request: Request, plan: SchedulerOutput) -> bool:
        """Give ``request`` the pages that the prefix cache has of it, and a seat, if the rest would fit too."""
        promised = self._promised(plan)
        state = (request.seq_id, self.pages.available() - promised)
        if (self.running and self._blocked == state) or not self.pages.can_open():
            return False
        # Prompt log-probabilities need the logits of every prompt token, so none is taken from the cache.
        known = [] if request.params.prompt_logprobs is not None else request.tokens
        cached = self.pages.open(request.seq_id, known, request.salt)
        needed = self._ahead(request, len(request.tokens) - cached)
        spare = self.pages.num_frames // WATERMARK if self.running else 0
        if needed + promised + spare > self.pages.available():
            self.pages.free(request.seq_id)
            self._blocked = state
            return False
        self._blocked = None
        cached = self.pages.restore(request.seq_id, known)
        request.computed = cached
        if request.cached is None:
            request.cached = cached
        request.status = RequestStatus.RUNNING
        self.waiting.remove(request)
        insort(self.running, request, key=_rank)
        return True

    def _promised(self, plan: SchedulerOutput) -> int:
        """Frames that prompts under way will take after this step; what the step itself takes is reserved already."""
        planned = {work.request.seq_id: work.count for work in plan.works}
        need = self.pages.frames_needed
        under_way = [r for r in self.running if r.remaining > 1]
        return sum(
            self._ahead(r, r.remaining) - (need(r.seq_id, planned[r.seq_id]) if r.seq_id in planned else 0)
            for r in under_way
        )

    def _ahead(self, request: Request, count: int) -> int:
        """Frames that ``request`` takes for ``count`` more tokens, in steps of the token budget."""
        return self.pages.frames_ahead(request.seq_id, count, self.max_num_batched_tokens)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
