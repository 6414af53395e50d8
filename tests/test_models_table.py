"""docs/models.md says what really happens to a tiny model of every family."""

from __future__ import annotations

from functools import cache

import pytest
from helpers.families import Facts, facts_of
from helpers.tiny_engine import one_thread
from helpers.zoo import ZOO
from models_table import PAGE, page_with

from kvbits.kernels.products import Products

pytest.importorskip("triton", reason="Triton exists for Linux only")

__all__ = ["one_thread"]

facts = cache(facts_of)


@pytest.mark.parametrize("family", ZOO)
def test_a_family_runs_as_transformers_does_or_is_refused(family: str) -> None:
    """Greedy text, loss and :class:`Facts` of one; another family that is refused says why."""
    found = facts(family)
    assert isinstance(found, Facts)
    assert bool(found.reason) != bool(found.cpu and found.gpu and found.cache)


@pytest.mark.skipif(Products().name == "scalar", reason="weights are not packed here, so nothing runs fused")
def test_the_page_is_true() -> None:
    page = page_with(facts(family) for family in ZOO)
    assert PAGE.read_text(encoding="utf-8") == page, "python tests/models_table.py --write"
