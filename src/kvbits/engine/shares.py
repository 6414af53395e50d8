"""What each client has had, so that those who share an engine get equal parts of it. No torch.

Virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", 2024. Who comes back after a pause
starts where the least served of the others stands, so that nobody saves up a claim.
"""

from __future__ import annotations


class Shares:
    """Sequences under way and tokens served, by client. A *client* is any name; there is no order among them."""

    def __init__(self) -> None:
        self._active: dict[str, set[int]] = {}
        self._served: dict[str, int] = {}

    @property
    def several(self) -> bool:
        """Whether more than one client has sequences."""
        return len(self._active) > 1

    def enter(self, client: str, seq_id: int) -> None:
        """A sequence waits or runs; telling it again changes nothing."""
        if client not in self._active:
            if not self._active:
                self._served.clear()
            least = min((self._served[other] for other in self._active), default=0)
            self._served[client] = max(self._served.get(client, 0), least)
            self._active[client] = set()
        self._active[client].add(seq_id)

    def leave(self, client: str, seq_id: int) -> None:
        """A sequence has ended; unknown ones are fine."""
        sequences = self._active.get(client)
        if sequences is not None:
            sequences.discard(seq_id)
            if not sequences:
                del self._active[client]

    def charge(self, client: str, tokens: int) -> None:
        """The engine works on ``tokens`` for a client that has sequences."""
        self._served[client] += tokens

    def served(self, client: str) -> int:
        """Tokens that count for a client that has sequences."""
        return self._served[client]

    def counts(self) -> dict[str, int]:
        """Sequences that wait or run, by client."""
        return {client: len(sequences) for client, sequences in self._active.items()}
