"""What speculation brought, in numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SpeculationStats:
    """Totals since the start.

    A *draft* is the guess for one sequence in one step. ``accepted_at[i]`` counts drafts whose token ``i`` was kept.
    ``withheld`` counts the steps of sequences in which nothing was guessed because that was measured to be faster;
    ``suspended`` how often a sequence was set aside for a while because its guesses failed; ``plain_steps`` the steps
    without drafts that measure what a step costs. ``failures`` counts errors while guessing, which cost a sequence its
    guesses and never its answer.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    withheld: int = 0
    suspended: int = 0
    plain_steps: int = 0
    failures: int = 0

    def verified(self, drafted: int, accepted: int) -> None:
        """Account for a draft of ``drafted`` tokens, of which the first ``accepted`` were kept."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for position in range(accepted):
            self.accepted_at[position] += 1

    @property
    def acceptance(self) -> float:
        """Share of the guessed tokens that were kept; 0 before the first."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def mean_length(self) -> float:
        """Tokens that a step with a draft brings: the accepted ones and one more."""
        return 1.0 + (self.accepted_tokens / self.drafts if self.drafts else 0.0)

    def as_json(self) -> dict[str, Any]:
        """The totals and both ratios."""
        return {
            "num_drafts": self.drafts,
            "num_draft_tokens": self.draft_tokens,
            "num_accepted_tokens": self.accepted_tokens,
            "num_accepted_tokens_per_pos": list(self.accepted_at),
            "acceptance_rate": self.acceptance,
            "mean_acceptance_length": self.mean_length,
            "withheld": self.withheld,
            "suspended": self.suspended,
            "plain_steps": self.plain_steps,
            "failures": self.failures,
        }

    def line(self) -> str:
        """One line for people."""
        return (
            f"speculation: {self.accepted_tokens:,} of {self.draft_tokens:,} guessed tokens kept "
            f"({self.acceptance:.0%}), {self.mean_length:.2f} tokens a step with a guess; "
            f"{self.withheld:,} steps without one because it would lose"
        )
