"""How many guessed tokens a step has room for. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.engine.request import Request
from kvbits.pages import PageManager


class DraftRoom:
    """Rows, frames and slots of one step that guesses may take: nobody is preempted for a guess.

    ``decodes`` will each store one token in the step; ``rows`` are left for guesses. A guess that reaches the end of a
    page needs frames of its own (the page is sealed tentatively, the next one begun); it is cut there when the frames
    are not to spare.
    """

    def __init__(self, pages: PageManager, decodes: Sequence[Request], rows: int) -> None:
        self._pages = pages
        self._rows = rows
        self._spare = 0
        if any(r.draft for r in decodes):
            self._spare = pages.available() - sum(pages.frames_needed(r.seq_id, 1) for r in decodes)

    def take(self, request: Request) -> tuple[int, ...]:
        """As much of ``request.draft`` as there is room for; the room is taken."""
        draft = request.draft[: max(self._rows, 0)]
        if self._pages.states is not None:
            draft = draft[: self._pages.states.available()]
        if not draft or self._spare < 0:
            return ()
        extra = self._extra(request, len(draft))
        if extra > self._spare:
            # The token before the guess stays where it is; what follows it inside the page is free.
            inside = -(request.computed + 1) % self._pages.page_tokens - 1
            draft = draft[: max(inside, 0)]
            extra = self._extra(request, len(draft)) if draft else 0
        if not draft or extra > self._spare:
            return ()
        self._spare -= extra
        self._rows -= len(draft)
        return tuple(draft)

    def _extra(self, request: Request, count: int) -> int:
        """Frames that ``count`` guessed tokens take beyond those of the token before them."""
        need = self._pages.frames_needed
        return need(request.seq_id, 1 + count, tentative=True) - need(request.seq_id, 1)
