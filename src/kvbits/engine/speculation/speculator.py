"""When to guess, and how many tokens: decided by what guesses and steps were measured to bring and to cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kvbits.engine.request import Request
from kvbits.engine.request_state import RequestState
from kvbits.engine.scheduler import ScheduledRequest
from kvbits.engine.speculation.config import SpeculativeConfig
from kvbits.engine.speculation.cost import StepCost
from kvbits.engine.speculation.proposer import Candidate, Proposer
from kvbits.engine.speculation.stats import SpeculationStats
from kvbits.engine.speculation.trust import PROBE, Trust

log = logging.getLogger(__name__)

PLAIN_EVERY = 32
"""After so many steps with guesses one goes without, so that the cost of such a step stays known."""

MOST_FAILURES = 8
"""After so many sequences in a row for which guessing failed nothing is guessed any more."""

_BELIEF = 0.7


class Speculator:
    """Fills ``request.draft`` before a step is planned, and learns from what came of it."""

    def __init__(self, proposer: Proposer, config: SpeculativeConfig, stats: SpeculationStats) -> None:
        self.stats = stats
        self.cost = StepCost()
        self._proposer = proposer
        self._config = config
        self._trust: dict[int, Trust] = {}
        self._since_plain = 0
        self._belief = Trust(_BELIEF)
        self._without: set[int] = set()
        self._failed = 0

    def propose(self, requests: Sequence[Request], states: Mapping[int, RequestState]) -> None:
        """Guess for those of ``requests`` (all wait for their next token) that it is worth for.

        Answers do not depend on guesses: whatever fails here, the requests go on without.
        """
        for request in requests:
            request.draft = []
        if self._failed >= MOST_FAILURES or not requests:
            return
        try:
            measures = self._measures()
            able = [states[r.seq_id] for r in requests if r.seq_id not in self._without and not measures]
            candidates = [c for c in (self._candidate(state, len(requests)) for state in able) if c is not None]
        except Exception:
            self._fail("whether to guess could not be decided")
            return
        if candidates:
            self._guess(candidates)

    def verified(self, work: ScheduledRequest, accepted: int) -> None:
        """Of the guess of ``work`` the first ``accepted`` tokens were kept."""
        drafted = len(work.draft)
        self.stats.verified(drafted, accepted)
        self._belief.verified(drafted, accepted)
        if trust := self._trust.get(work.request.seq_id):
            trust.verified(drafted, accepted)

    def observe(self, works: Sequence[ScheduledRequest], seconds: float) -> None:
        """A step of ``works`` took ``seconds``, guessing not included. Steps that read prompts teach nothing here."""
        if all(work.count == 1 and work.samples for work in works):
            guessed = sum(len(work.draft) for work in works)
            self._since_plain = self._since_plain + 1 if guessed else 0
            try:
                self.cost.observe(len(works), guessed, seconds)
            except Exception:
                self._fail("the cost of a step could not be learned")

    def forget(self, request: Request) -> None:
        """The sequence has ended."""
        self._trust.pop(request.seq_id, None)
        self._without.discard(request.seq_id)
        try:
            self._proposer.forget(request)
        except Exception:
            self._fail("a sequence could not be forgotten")

    def _guess(self, candidates: Sequence[Candidate]) -> None:
        """Guess for all ``candidates``; if that fails, for each alone, and never again for one that fails alone."""
        try:
            guesses = self._proposer.propose(candidates)
            if [len(g) <= c.count for g, c in zip(guesses, candidates, strict=True)].count(False):
                raise ValueError(f"guesses of {[len(g) for g in guesses]} tokens for {[c.count for c in candidates]}")
        except Exception:
            self._fail(f"guessing tokens for {len(candidates)} sequences failed", in_a_row=len(candidates) == 1)
        else:
            self._failed = 0
            for candidate, guess in zip(candidates, guesses, strict=True):
                candidate.request.draft = guess
            return
        if len(candidates) == 1:
            self._without.add(candidates[0].request.seq_id)
            return
        for candidate in candidates:
            if self._failed < MOST_FAILURES:
                self._guess([candidate])

    def _fail(self, what: str, in_a_row: bool = True) -> None:
        """Account for the exception being handled."""
        self.stats.failures += 1
        self._failed += in_a_row
        off = "; nothing is guessed from now on" if self._failed == MOST_FAILURES else ""
        log.exception("%s%s", what, off)

    def _measures(self) -> bool:
        """Whether the step must go without guesses, to learn what such a step costs."""
        if not self._config.adaptive or (self.cost.known and self._since_plain < PLAIN_EVERY):
            return False
        self.stats.plain_steps += 1
        return True

    def _candidate(self, state: RequestState, sequences: int) -> Candidate | None:
        """``live`` with the number of tokens to guess; ``None``: not in this step."""
        most = min(self._config.num_speculative_tokens, state.room - 1)
        if most < 1:
            return None
        count = most
        if self._config.adaptive:
            trust = self._trust.get(state.request.seq_id)
            if trust is None:
                trust = self._trust[state.request.seq_id] = Trust(self._belief.chance)
            before = trust.rests
            # A step brings one token to each sequence, so a token more is worth that share of a step.
            gain = self.cost.step(sequences) / sequences
            # The first guess of all is short: nobody knows yet what a wider step costs.
            most = most if self.cost.tried else min(most, PROBE)
            count = trust.plan(most, gain, self.cost.margin() + self._proposer.cost / sequences)
            self.stats.suspended += trust.rests - before
            self.stats.withheld += not count
        return Candidate(state.request, state.sampling, count) if count else None
