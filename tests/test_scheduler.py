"""The scheduler alone: plain integers, a page manager, and a stand-in for the model that appends numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.scheduling import World
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.engine.request import FinishReason
from kvbits.engine.scheduler import SchedulerOutput


def counts(plan: SchedulerOutput) -> dict[int, int]:
    return {w.request.seq_id: w.count for w in plan.works}


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    world = World(frames=100, budget=128)
    for _ in range(3):
        world.add(100, 4, first=1000 * world.count)
    assert counts(world.step()) == {0: 100, 1: 28}
    assert counts(world.step()) == {0: 1, 1: 72, 2: 55}


def test_a_huge_prompt_does_not_stop_running_answers() -> None:
    world = World(frames=300, budget=128)
    world.add(10, 50)
    world.step()
    world.add(5000, 2, first=500)
    for _ in range(20):
        planned = counts(world.step())
        assert planned[0] == 1
        assert planned[1] == 127


def test_prompts_go_on_where_answers_use_up_the_budget() -> None:
    world = World(frames=400, max_num_seqs=64, budget=32)
    for i in range(40):
        world.add(1, 200, first=i)
    for _ in range(2):
        world.step()
    assert len(world.scheduler.running) == 40
    world.add(100, 2, first=5000)
    planned = counts(world.step())
    assert planned[40] == 32
    assert sum(planned.values()) == 72


def test_a_better_priority_goes_first() -> None:
    world = World(frames=100, budget=64)
    world.add(200, 1, priority=1)
    world.add(200, 1, priority=0, first=1000)
    world.run()
    assert world.order == [1, 0]


def test_admission_waits_for_the_frames_of_the_whole_prompt() -> None:
    world = World(frames=16, budget=64)
    world.add(64 * 8, 2)  # 8 sealed and the open page: 11 frames
    world.add(64 * 3, 2, first=1000)  # 6 frames: one too many, although only a chunk of the first is stored yet
    assert list(counts(world.step())) == [0]
    assert world.scheduler.waiting[0].seq_id == 1
    world.run()


def test_admission_needs_no_frames_for_cached_pages() -> None:
    world = World(frames=16, budget=1024)
    first = world.add(64 * 8 + 1, 3)
    world.step()
    second = world.add(64 * 8 + 1, 3)
    world.step()
    assert second.computed == 64 * 8 + 1
    assert second.cached == 64 * 8
    assert first.cached == 0


def test_the_newest_of_the_lowest_priority_is_preempted_and_resumes() -> None:
    world = World(frames=14, budget=1024, caching=False)
    world.add(100, 150, priority=0)
    world.add(100, 150, priority=1, first=1000)
    third = world.add(64, 150, priority=0, first=2000)
    preempted: list[int] = []
    for _ in range(1000):
        if not (world.scheduler.running or world.scheduler.waiting):
            break
        preempted += [r.seq_id for r in world.step().preempted]
    assert preempted[0] == 1
    assert not world.exhausted
    assert sorted(world.order) == [0, 1, 2]
    assert world.order[-1] == 1
    assert third.preemptions == 0


def test_a_request_alone_that_outgrows_the_pool_ends() -> None:
    world = World(frames=6)
    request = world.add(100, 1000)
    world.run()
    assert world.exhausted == [request]
    assert len(request.tokens) == 3 * 64 + 63 + 1


def test_the_seats_are_limited() -> None:
    world = World(frames=100, max_num_seqs=2, budget=1000)
    for i in range(5):
        world.add(10, 3, first=100 * i)
    assert list(counts(world.step())) == [0, 1]
    world.run()
    assert world.order == [0, 1, 2, 3, 4]


def test_a_removed_request_gives_its_frames_back_and_is_never_planned() -> None:
    world = World(frames=20, budget=64, caching=False)
    running = world.add(640, 5)
    waiting = world.add(640, 5, first=1000)
    world.step()
    for request in (running, waiting):
        world.finish(request, FinishReason.ABORT)
    assert world.pages.available() == 20
    assert not world.step().works


def test_followers_wait_for_their_leader() -> None:
    world = World(frames=40, budget=64)
    leader = world.add(130, 3)
    follower = world.add(130, 3, leader=leader)
    other = world.add(10, 3, first=500)
    assert follower.seq_id not in counts(world.step())
    world.run()
    assert follower.cached == 128
    assert other.cached == 0


def test_suspects_run_alone() -> None:
    world = World(frames=40, budget=256)
    requests = [world.add(20, 5, first=100 * i) for i in range(3)]
    world.step()
    for request in requests:
        request.suspect = True
        world.scheduler.requeue(request)
    for request in requests:
        plan = world.scheduler.schedule()
        assert [w.request for w in plan.works] == [request]
        work = plan.works[0]
        world.pages.commit(request.seq_id, request.tokens[: work.count])
        request.computed = work.count
        request.tokens.append(1)
        request.suspect = False
    world.run()


def test_an_answer_may_take_the_pages_of_the_first_prompt_under_way() -> None:
    world = World(frames=6, max_num_seqs=4, budget=1, caching=False)
    for prompt, new in ((46, 118), (53, 26)):
        world.add(prompt, new, first=1000 * world.count)
        world.step()
    world.run()
    assert sorted(world.order) == [0, 1]


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(5, 40),
    seats=st.integers(1, 6),
    budget=st.sampled_from([1, 7, 64, 100, 512]),
    caching=st.booleans(),
    requests=st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 150), st.integers(0, 2), st.booleans()), min_size=1, max_size=10
    ),
)
def test_any_workload_ends(frames: int, seats: int, budget: int, caching: bool, requests: list) -> None:
    world = World(frames, seats, budget, caching)
    added = []
    for i, (prompt, new, priority, shared) in enumerate(requests):
        prompt = min(prompt, world.scheduler.capacity_tokens - 1)
        added.append(world.add(prompt, new, priority, first=0 if shared else 1000 * i))
        world.step()
    world.run()
    for request in added:
        whole = world.lengths[request.seq_id]
        if request in world.exhausted:
            assert whole > world.scheduler.capacity_tokens
            assert len(request.tokens) == world.scheduler.capacity_tokens + 1
        else:
            assert len(request.tokens) == whole


@pytest.mark.parametrize(
    "module", ["scheduler", "request", "params", "outputs", "detokenize", "sampling", "stops", "shares"]
)
def test_no_torch(module: str) -> None:
    code = f"import sys, kvbits.engine.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
