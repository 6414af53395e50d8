"""Everything at once, at random, with faults put in: each answer is the isolated one, and no page is ever lost.

See ``helpers/stress.py``. Each run is one number; a failure prints how to see it again.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from helpers.asks import UNFUSED, kinds
from helpers.stress import Stress
from helpers.tiny import HYBRIDS
from helpers.tiny_engine import one_thread

__all__ = ["one_thread"]

SEEDS, UNFUSED_SEEDS = 7, 3


@pytest.mark.parametrize(
    ("method", "family"), [kind for kind in kinds() if kind[0] != "draft_model" or kind[1] not in HYBRIDS]
)
def test_a_mixed_load_with_faults(method: str, family: str) -> None:
    total: Counter[str] = Counter()
    unfused = family in UNFUSED  # slower
    for seed in range(UNFUSED_SEEDS if unfused else SEEDS):
        total += Stress(seed, method, family).run()
    # The load was one.
    wanted = ["equal answers", "cached tokens", "cancels"]
    for kind in wanted if unfused else [*wanted, "preemptions", "errors", "imported pages", "faults: model"]:
        assert total[kind] > 0, (kind, total)
    assert total["equal answers"] > 0.4 * total["requests"], total
    # these random weights repeat nothing, so all guesses may be taken back; test_hybrids, test_latents have half right
    assert method == "none" or total["guessed tokens" if unfused else "tokens kept of guesses"] > 10, total


@pytest.mark.soak
def test_replay(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--stress-seed")
    if seed is None:
        pytest.skip("--stress-seed says which run")
    chosen = (request.config.getoption(f"--stress-{option}") for option in ("method", "family"))
    for kind, count in sorted(Stress(seed, *chosen).run().items()):
        print(f"{count:9,} {kind}")


@pytest.mark.soak
def test_a_long_mixed_load_of_the_engine(request: pytest.FixtureRequest) -> None:
    end = time.monotonic() + 60 * request.config.getoption("--soak-minutes")
    first = seed = random.SystemRandom().randrange(10**9)
    total: Counter[str] = Counter()
    print(f"seeds from {first}")
    while time.monotonic() < end:
        total += Stress(seed).run()
        seed += 1
    print(f"{seed - first:,} runs")
    for kind, count in sorted(total.items()):
        print(f"{count:9,} {kind}")
