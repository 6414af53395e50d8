"""Logits for tokens that are given, through the real pool and kernels: what evaluations score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from kvbits.engine.batch import Piece, build
from kvbits.engine.runner import Runner
from kvbits.engine.sampler import NOT_FINITE, finite_rows
from kvbits.errors import RequestError
from kvbits.pages import PageManager


def teacher_forced(
    runner: Runner, pages: PageManager, seq_id: int, tokens: Sequence[int], first: int, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """See :meth:`kvbits.engine.engine.Engine.teacher_forced`."""
    # A salt that no request can have (it is not UTF-8) keeps these pages from being found.
    pages.open(seq_id, [], b"\xff%d" % seq_id)
    try:
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            end = start + len(part)
            pages.reserve(seq_id, len(part))
            outputs = max(0, min(len(part), end - first))
            logits = runner.run(build([Piece(seq_id, start, part, outputs)], pages))
            pages.commit(seq_id, part)
            if outputs:
                if not all(finite_rows(logits)):
                    raise RequestError(NOT_FINITE)
                yield end - outputs, logits
    finally:
        pages.free(seq_id)
