"""Guess with a model: a smaller one with a cache of its own, or the model itself on coarser pages."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.engine.batch import Piece, build
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.request import Request
from kvbits.engine.sampler import distribution, draw
from kvbits.engine.speculation.proposer import Candidate, Proposer
from kvbits.pages import PageManager

_SMOOTH = 0.8


@dataclass
class _Guess:
    """A candidate in one call: ``next`` are the tokens to read in the coming round, ``found`` the guess so far.

    ``kept``: tokens that the cache holds after the call.
    """

    candidate: Candidate
    next: list[int]
    most: int
    kept: int
    found: list[int] = field(default_factory=list)

    @property
    def seq_id(self) -> int:
        return self.candidate.request.seq_id

    def choose(self, logits: Tensor) -> int:
        """The token that the model would choose with the request's temperature and next random number."""
        params = self.candidate.request.params
        if params.greedy:
            return int(logits.argmax())
        probs, ids = distribution(logits, params.temperature, params.top_k, params.top_p, params.min_p)
        place = draw(probs, self.candidate.sampling.peek(len(self.found)))
        return place if ids is None else int(ids[place])


class ModelProposer(Proposer):
    """Runs a model token after token, all candidates together, and cuts its cache back to what it held before.

    A guess ends where its page does, so that no page is completed by guesses. Where the pool is full a sequence goes
    without.
    """

    def __init__(self, runner: ModelRunner, pages: PageManager, draft: bool) -> None:
        """``draft``: sealed pages are read as drafts."""
        self.pages = pages
        self._runner = runner
        self._draft = draft

    @abstractmethod
    def begin(self, candidates: Sequence[Candidate]) -> list[_Guess]:
        """What to read first for each candidate; ``most`` is 0 where nothing can be guessed."""

    @abstractmethod
    def undo(self, request: Request) -> None:
        """Leave nothing behind of a guess that failed midway."""

    def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        try:
            return self._propose(candidates)
        except BaseException:
            for candidate in candidates:
                self.undo(candidate.request)
            raise

    def _propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        guesses = self.begin(candidates)
        begin, rounds = time.perf_counter(), 1
        active = self._read([g for g in guesses if g.most > 0])
        if sum(len(g.next) for g in guesses) > PAGE_TOKENS:  # a prompt says nothing about the time of a round
            begin, rounds = time.perf_counter(), 0
        begun = list(active)
        while active := self._read([g for g in active if len(g.found) < g.most]):
            rounds += 1
        if rounds and begun:
            seconds = (time.perf_counter() - begin) / rounds
            self.cost = _SMOOTH * self.cost + (1 - _SMOOTH) * seconds if self.cost else seconds
        for guess in begun:
            self.pages.truncate(guess.seq_id, guess.kept)
        return [g.found for g in guesses]

    def _read(self, guesses: Sequence[_Guess]) -> list[_Guess]:
        """One step of the model; returns those that have now one guessed token more, which is read next."""
        planned = []
        for guess in guesses:
            if self.pages.frames_needed(guess.seq_id, len(guess.next)) <= self.pages.available():
                self.pages.reserve(guess.seq_id, len(guess.next))
                planned.append(guess)
        if not planned:
            return []
        pieces = [Piece(g.seq_id, self.pages.length(g.seq_id), g.next, 1) for g in planned]
        logits = self._runner.run(build(pieces, self.pages, self._draft)).cpu()
        advanced = []
        for guess, row in zip(planned, logits, strict=True):
            self.pages.commit(guess.seq_id, guess.next)
            own = len(guess.candidate.request.tokens)
            if self.pages.length(guess.seq_id) == own + len(guess.found):
                guess.found.append(guess.choose(row))
                guess.next = guess.found[-1:]
                advanced.append(guess)
        return advanced


class DraftModelProposer(ModelProposer):
    """A smaller model. Its cache holds a sequence's own tokens; guesses that were kept are read once more.

    A prompt is read in pieces of ``budget`` tokens a step; until it is read nothing is guessed for it.
    """

    def __init__(self, runner: ModelRunner, pages: PageManager, budget: int) -> None:
        super().__init__(runner, pages, draft=False)
        self._budget = budget

    def begin(self, candidates: Sequence[Candidate]) -> list[_Guess]:
        guesses, budget = [self._follow(c) for c in candidates], self._budget
        # A token at least for each, so that nobody waits for another one's prompt.
        for guess in sorted(guesses, key=lambda g: len(g.next)):
            guess.next = guess.next[: max(budget, 1)]
            budget -= len(guess.next)
        return guesses

    def forget(self, request: Request) -> None:
        if request.seq_id in self.pages.sequences():
            self.pages.free(request.seq_id)

    def undo(self, request: Request) -> None:
        self.forget(request)

    def _follow(self, candidate: Candidate) -> _Guess:
        request = candidate.request
        size = len(request.tokens)
        if request.seq_id in self.pages.sequences() and self.pages.length(request.seq_id) >= size:
            # No step followed the last guess; what may come next is in the logits of the last token, read once more.
            if size % PAGE_TOKENS:
                self.pages.truncate(request.seq_id, size - 1)
            else:
                self.pages.free(request.seq_id)
        if request.seq_id not in self.pages.sequences():
            self.pages.open(request.seq_id, request.tokens, request.salt)
        unread = request.tokens[self.pages.length(request.seq_id) :]
        # The last guessed token is not stored, so the page's last place stays empty.
        return _Guess(candidate, unread, min(candidate.count, PAGE_TOKENS - size % PAGE_TOKENS), size)


class SelfProposer(ModelProposer):
    """The model itself, on its own pages, of which it reads the drafts: half of the bytes of ``int8h``.

    What it stores lies in the open page, behind the tokens that are there, and is cut off again.
    """

    def __init__(self, runner: ModelRunner, pages: PageManager) -> None:
        super().__init__(runner, pages, draft=True)

    def begin(self, candidates: Sequence[Candidate]) -> list[_Guess]:
        guesses = []
        for candidate in candidates:
            tokens = candidate.request.tokens
            stored = len(tokens) - 1
            room = PAGE_TOKENS - 1 - stored % PAGE_TOKENS
            guesses.append(_Guess(candidate, tokens[-1:], min(candidate.count, room), stored))
        return guesses

    def undo(self, request: Request) -> None:
        if self.pages.reserved(request.seq_id):
            self.pages.rollback(request.seq_id)
        self.pages.truncate(request.seq_id, len(request.tokens) - 1)

    def forget(self, request: Request) -> None:
        """Nothing is kept."""
