"""When to guess, and how many tokens: decided by what guesses and steps were measured to bring and to cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kvbits.engine.live import Live
from kvbits.engine.request import Request
from kvbits.engine.scheduler import Work
from kvbits.engine.speculation.config import SpeculativeConfig
from kvbits.engine.speculation.cost import StepCost
from kvbits.engine.speculation.proposer import Candidate, Proposer
from kvbits.engine.speculation.stats import SpeculationStats
from kvbits.engine.speculation.trust import PROBE, Trust

log = logging.getLogger(__name__)

PLAIN_EVERY = 32
"""After so many steps with guesses one goes without, so that the cost of such a step stays known."""

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

    def propose(self, requests: Sequence[Request], lives: Mapping[int, Live]) -> None:
        """Guess for those of ``requests`` (all wait for their next token) that it is worth for."""
        for request in requests:
            request.draft = []
        if self.stats.failures or not requests or self._measures():
            return
        candidates = [c for c in (self._candidate(lives[r.seq_id], len(requests)) for r in requests) if c is not None]
        if not candidates:
            return
        try:
            guesses = self._proposer.propose(candidates)
        # Answers do not depend on guesses: whatever fails here, the requests go on without.
        except Exception:
            log.exception("guessing tokens failed; speculation is off from now on")
            self.stats.failures += 1
            return
        for candidate, guess in zip(candidates, guesses, strict=True):
            assert len(guess) <= candidate.count, (guess, candidate.count)
            candidate.request.draft = guess

    def verified(self, work: Work, accepted: int) -> None:
        """Of the guess of ``work`` the first ``accepted`` tokens were kept."""
        drafted = len(work.draft)
        self.stats.verified(drafted, accepted)
        self._belief.verified(drafted, accepted)
        if trust := self._trust.get(work.request.seq_id):
            trust.verified(drafted, accepted)

    def observe(self, works: Sequence[Work], seconds: float) -> None:
        """A step of ``works`` took ``seconds``, guessing not included. Steps that read prompts teach nothing here."""
        if all(work.count == 1 and work.samples for work in works):
            guessed = sum(len(work.draft) for work in works)
            self.cost.observe(len(works), guessed, seconds)
            self._since_plain = self._since_plain + 1 if guessed else 0

    def forget(self, request: Request) -> None:
        """The sequence has ended."""
        self._trust.pop(request.seq_id, None)
        self._proposer.forget(request)

    def _measures(self) -> bool:
        """Whether the step must go without guesses, to learn what such a step costs."""
        if not self._config.adaptive or (self.cost.known and self._since_plain < PLAIN_EVERY):
            return False
        self.stats.plain_steps += 1
        return True

    def _candidate(self, live: Live, sequences: int) -> Candidate | None:
        """``live`` with the number of tokens to guess; ``None``: not in this step."""
        most = min(self._config.num_speculative_tokens, live.room - 1)
        if most < 1:
            return None
        count = most
        if self._config.adaptive:
            trust = self._trust.get(live.request.seq_id)
            if trust is None:
                trust = self._trust[live.request.seq_id] = Trust(self._belief.chance)
            before = trust.rests
            # A step brings one token to each sequence, so a token more is worth that share of a step.
            gain = self.cost.step(sequences) / sequences
            # The first guess of all is short: nobody knows yet what a wider step costs.
            most = most if self.cost.tried else min(most, PROBE)
            count = trust.plan(most, gain, self.cost.margin() + self._proposer.cost / sequences)
            self.stats.suspended += trust.rests - before
            self.stats.withheld += not count
        return Candidate(live.request, live.sampling, count) if count else None
