"""The parts that decide what to guess, how much and whether: no model."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import pytest

from kvbits.engine.detokenize import TokenDecoder
from kvbits.engine.drafts import DraftRoom
from kvbits.engine.params import SamplingParams
from kvbits.engine.request import Request, RequestStatus
from kvbits.engine.request_state import RequestState
from kvbits.engine.scheduler import ScheduledRequest, Scheduler
from kvbits.engine.speculation import Candidate, Proposer, SpeculationStats, SpeculativeConfig, Speculator
from kvbits.engine.speculation.cost import StepCost
from kvbits.engine.speculation.ngram import NgramIndex
from kvbits.engine.speculation.speculator import PLAIN_EVERY
from kvbits.engine.speculation.trust import Trust
from kvbits.pages import PageManager


def slow_guess(tokens: list[int], count: int, shortest: int, longest: int) -> list[int]:
    """What :class:`NgramIndex` promises, by search."""
    size = len(tokens)
    for length in range(min(longest, size), shortest - 1, -1):
        for end in range(size - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[size - length :]:
                found = tokens[end:]
                while len(found) < count:
                    found += found[: count - len(found)]
                return found[:count]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 4), (2, 3)])
def test_prompt_lookup_finds_the_latest_longest_match(shortest: int, longest: int) -> None:
    chance = random.Random(shortest * 10 + longest)
    for _ in range(30):
        index, tokens = NgramIndex(shortest, longest), [0]
        while len(tokens) < 60:
            tokens += chance.choices(range(4), k=chance.randint(1, 5))
            count = chance.randint(1, 9)
            assert index.guess(tokens, count) == slow_guess(tokens, count, shortest, longest)


# What a step costs


def test_the_cost_of_a_guessed_row_is_measured() -> None:
    cost, noise = StepCost(), random.Random(0)
    assert not cost.known
    for i in range(200):
        sequences, guessed = 1 + i % 3, (i * 7) % 20
        seconds = 0.010 + 0.002 * sequences + 0.0005 * guessed
        # Now and then something else holds the processor.
        cost.observe(sequences, guessed, seconds * (30 if i % 25 == 3 else noise.uniform(0.97, 1.03)))
    assert cost.known
    assert cost.margin() == pytest.approx(0.0005, rel=0.3)
    assert cost.step(2) == pytest.approx(0.014, rel=0.15)


def test_steps_of_one_kind_leave_the_cost_as_believed() -> None:
    cost = StepCost()
    for _ in range(10):
        cost.observe(1, 0, 0.020)
    assert cost.step(1) == pytest.approx(0.020, rel=0.01)
    assert cost.margin() == pytest.approx(0.0004, rel=0.01)


# When a sequence is worth a guess


def test_longer_guesses_where_they_are_kept() -> None:
    good, poor = Trust(0.7), Trust(0.7)
    for _ in range(20):
        good.verified(8, 8)
        poor.verified(8, 1)
    assert good.chance > 0.95
    assert poor.chance < 0.6
    assert good.plan(8, 1.0, 0.1) == 8
    assert 1 <= poor.plan(8, 1.0, 0.1) <= 4
    # Ten sequences: a step brings ten tokens anyway, so one more is worth a tenth.
    assert good.plan(8, 0.1, 0.1) == 0


def test_a_sequence_whose_guesses_fail_rests_longer_and_longer() -> None:
    trust, guessed = Trust(0.7), []
    for step in range(1000):
        if count := trust.plan(8, 1.0, 0.2):
            guessed.append(step)
            trust.verified(count, 0)
    assert len(guessed) < 20
    assert trust.rests >= 5
    assert max(b - a for a, b in pairwise(guessed)) > 200
    # It comes back when its guesses hold again.
    kept = 0
    for _ in range(400):
        if count := trust.plan(8, 1.0, 0.2):
            trust.verified(count, count)
            kept += count
    assert kept > 500


class Fixed(Proposer):
    """Guesses as much as it may."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gone: list[int] = []

    def propose(self, candidates: list[Candidate]) -> list[list[int]]:
        self.asked.extend(c.count for c in candidates)
        return [[7] * c.count for c in candidates]

    def forget(self, request: Request) -> None:
        self.gone.append(request.seq_id)


def simulate(accepted: float, margin: float, sequences: int = 1, steps: int = 600) -> tuple[float, SpeculationStats]:
    """Seconds a token of a made-up engine relative to plain decoding, when each guessed token holds with a chance."""
    chance, proposer, stats = random.Random(1), Fixed(), SpeculationStats()
    speculator = Speculator(proposer, SpeculativeConfig(), stats)
    states = {}
    for i in range(sequences):
        request = Request(i, [1, 2, 3], SamplingParams(max_tokens=10**9), status=RequestStatus.RUNNING)
        states[i] = RequestState(request, TokenDecoder(lambda ids: ""), frozenset(), 10**9)
    seconds = tokens = 0.0
    for _ in range(steps):
        speculator.propose([v.request for v in states.values()], states)
        works = [ScheduledRequest(v.request, 0, 1, 1, True, tuple(v.request.draft)) for v in states.values()]
        took = 1.0 + margin * sum(len(w.draft) for w in works)
        for work in works:
            kept = 0
            while kept < len(work.draft) and chance.random() < accepted:
                kept += 1
            if work.draft:
                speculator.verified(work, kept)
            tokens += 1 + kept
        speculator.observe(works, took)
        seconds += took
    for state in states.values():
        speculator.forget(state.request)
    assert sorted(proposer.gone) == list(states)
    return seconds / tokens * sequences, stats


def test_speculation_gains_where_it_can_and_stops_where_it_loses() -> None:
    relative, stats = simulate(accepted=0.8, margin=0.03)
    assert relative < 0.45
    assert stats.plain_steps >= 600 // (PLAIN_EVERY + 2)
    for accepted, margin, sequences in ((0.02, 0.1, 1), (0.8, 1.0, 1), (0.5, 0.2, 8)):
        relative, stats = simulate(accepted, margin, sequences)
        assert relative < 1.05, (accepted, margin, sequences, relative)
        assert stats.withheld > 0.8 * 600 * sequences
        assert stats.suspended > 0


# Room in a step


def test_guesses_take_only_what_is_to_spare() -> None:
    pages = PageManager(14, 3)
    requests = []
    for seq_id, length in enumerate((60, 63, 10)):
        request = Request(seq_id, list(range(length + 1)), SamplingParams(), status=RequestStatus.RUNNING)
        pages.open(seq_id, [])
        pages.reserve(seq_id, length)
        pages.commit(seq_id, request.tokens[:length])
        request.computed, request.draft = length, [5] * 8
        requests.append(request)
    # 14 frames: three open pages leave 5; sequence 1 needs a frame to seal its page.
    assert pages.available() == 5
    room = DraftRoom(pages, requests, rows=100)
    assert [len(room.take(r)) for r in requests] == [8, 0, 8]
    narrow = DraftRoom(pages, requests, rows=10)
    assert [len(narrow.take(r)) for r in requests] == [8, 0, 2]
    pages.open(9, [])
    pages.reserve(9, 5)
    assert pages.available() == 2
    tight = DraftRoom(pages, requests, rows=100)
    # Up to the page's end: 60 stored, one certain, two guessed, and the last place stays empty.
    assert [len(tight.take(r)) for r in requests] == [2, 0, 8]


def test_a_plan_with_guesses_keeps_to_the_budget_and_preempts_nobody() -> None:
    pages = PageManager(40, 3)
    scheduler = Scheduler(pages, 30 * 64, max_num_seqs=8, max_num_batched_tokens=16)
    requests = [Request(i, list(range(i, i + 20)), SamplingParams()) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    while len(scheduler.decoding()) < 3:
        for work in scheduler.schedule().works:
            pages.commit(work.request.seq_id, work.tokens)
            work.request.computed += work.count
            if work.samples:
                work.request.tokens.append(99)
    for request in requests:
        request.draft = [1] * 8
    plan = scheduler.schedule()
    assert [len(w.draft) for w in plan.works] == [8, 5, 0]
    assert [w.outputs for w in plan.works] == [9, 6, 1]
    assert sum(len(w.tokens) for w in plan.works) == 16
    assert not plan.preempted
    for work, kept in zip(plan.works, (8, 2, 0), strict=True):
        pages.commit(work.request.seq_id, work.tokens[: 1 + kept])
        assert pages.length(work.request.seq_id) == work.start + 1 + kept
    pages.check()


def test_guessing_by_lookup_needs_no_torch() -> None:
    code = "import sys, kvbits.engine.speculation, kvbits.engine.speculation.ngram; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
