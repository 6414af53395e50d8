"""A short prompt behind a huge one has its first token soon, the huge one is not starved, clients get equal parts."""

from __future__ import annotations

import random
from collections import Counter

from helpers.scheduling import World
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.engine.shares import Shares


def steps_until(world: World, *requests: object) -> list[int]:
    """In which step each request got its first token."""
    found: dict[int, int] = {}
    for step in range(1, 200):
        world.step()
        for index, request in enumerate(requests):
            if request.num_output and index not in found:
                found[index] = step
        if len(found) == len(requests):
            return [found[i] for i in range(len(requests))]
    raise AssertionError(found)


def test_short_prompts_do_not_wait_for_a_huge_one() -> None:
    world = World(frames=200, budget=128)
    huge = world.add(4000, 3)
    world.step()
    short = [world.add(40, 3, first=10_000 + 100 * i) for i in range(4)]
    *firsts, last = steps_until(world, *short, huge)
    # 64 tokens of each step are theirs
    assert firsts == [1, 2, 2, 3]
    assert last <= 34


def test_a_huge_prompt_keeps_half_of_every_step() -> None:
    world = World(frames=400, budget=128)
    huge = world.add(2560, 3)
    world.step()
    steps = 0
    while not huge.num_output:
        world.add(100, 1, first=20_000 + 200 * steps)
        world.step()
        steps += 1
    # 2,432 tokens are left: 19 steps alone, 38 with half of each
    assert 19 < steps <= 40


def test_prompts_of_a_kind_go_in_order() -> None:
    world = World(frames=200, budget=128)
    first, second = world.add(900, 1), world.add(700, 1, first=5000)
    assert steps_until(world, first, second) == [8, 13]


def test_a_lower_priority_does_not_overtake() -> None:
    world = World(frames=200, budget=128)
    huge = world.add(2000, 1)
    world.step()
    late = world.add(40, 1, priority=1, first=5000)
    urgent = world.add(40, 1, priority=-1, first=6000)
    order = steps_until(world, urgent, huge, late)
    assert order[0] == 1
    assert order[1] <= order[2]


def seats(world: World) -> Counter[str]:
    return Counter(r.client for r in world.scheduler.running)


def test_a_client_with_all_seats_gives_half_of_them_to_another() -> None:
    world = World(frames=400, max_num_seqs=8, budget=256)
    for i in range(12):
        world.add(20, 400, first=1000 * i, client="greedy")
    for _ in range(5):
        world.step()
    assert seats(world) == {"greedy": 8}
    honest = [world.add(20, 5, first=100_000 + 1000 * i, client="honest") for i in range(8)]
    world.step()
    assert honest[0].num_output == 1
    for _ in range(3):
        world.step()
    assert seats(world) == {"greedy": 4, "honest": 4}
    world.run()
    assert world.order[:8] == [r.seq_id for r in honest]


def test_a_third_client_gets_its_third() -> None:
    world = World(frames=400, max_num_seqs=9, budget=512)
    for name in ("a", "b", "c"):
        for _ in range(10):
            world.add(10, 300, first=1000 * world.count, client=name)
        for _ in range(12):
            world.step()
    assert seats(world) == {"a": 3, "b": 3, "c": 3}


def test_prompts_of_two_clients_get_half_of_the_steps_each() -> None:
    world = World(frames=2000, max_num_seqs=64, budget=128)
    for i in range(20):
        world.add(500, 1, first=1000 * i, client="many")
    world.step()
    for i in range(4):
        world.add(1500, 1, first=100_000 + 2000 * i, client="few")
    tokens: Counter[str] = Counter()
    for _ in range(60):
        for work in world.step().works:
            tokens[work.request.client] += work.count
    assert abs(tokens["many"] - tokens["few"]) <= 1500, tokens


def test_a_client_that_fills_the_pool_makes_way_but_its_oldest_goes_on() -> None:
    world = World(frames=64, max_num_seqs=32, budget=512, caching=False)
    greedy = [world.add(500, 200, first=1000 * i, client="greedy") for i in range(5)]
    for _ in range(10):
        world.step()
    running = seats(world)["greedy"]
    assert running > 2
    honest = world.add(400, 3, first=50_000, client="honest")
    for _ in range(8):
        world.step()
    assert honest.num_output
    assert not greedy[0].preemptions
    world.run()
    assert not world.exhausted


def test_a_single_sequence_is_left_alone() -> None:
    world = World(frames=20, max_num_seqs=8, budget=512, caching=False)
    alone = world.add(800, 100, client="one")
    world.step()
    other = world.add(400, 3, first=5000, client="two")
    for _ in range(5):
        world.step()
    assert not alone.preemptions
    assert other.computed == 0
    world.run()
    assert not world.exhausted


def test_who_comes_back_has_saved_up_nothing() -> None:
    shares = Shares()
    shares.enter("steady", 1)
    shares.enter("pauses", 2)
    shares.charge("steady", 100)
    shares.leave("pauses", 2)
    shares.charge("steady", 900)
    shares.enter("pauses", 3)
    assert shares.served("pauses") == 1000
    for client, seq_id in (("steady", 1), ("pauses", 3), ("nobody", 9)):
        shares.leave(client, seq_id)
    assert shares.counts() == {}
    shares.enter("pauses", 4)
    assert shares.served("pauses") == 0


def test_a_better_priority_is_not_shared_away() -> None:
    world = World(frames=400, max_num_seqs=4, budget=128)
    for i in range(4):
        world.add(10, 100, priority=-1, first=1000 * i, client="paid")
    world.step()
    world.add(10, 3, first=50_000, client="free")
    for _ in range(50):
        world.step()
    assert seats(world) == {"paid": 4}
    world.run()


CLIENT = st.tuples(st.integers(1, 8), st.integers(1, 200), st.integers(1, 120), st.integers(0, 6))


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(12, 40),
    max_num_seqs=st.integers(2, 6),
    budget=st.sampled_from([7, 64, 200]),
    caching=st.booleans(),
    clients=st.lists(CLIENT, min_size=2, max_size=4),
)
def test_every_client_is_served_whatever_the_others_do(
    frames: int, max_num_seqs: int, budget: int, caching: bool, clients: list[tuple[int, int, int, int]]
) -> None:
    world = World(frames, max_num_seqs, budget, caching)
    for number, (count, prompt, new, pause) in enumerate(clients):
        for i in range(count):
            world.add(prompt, new, first=100_000 * number + (0 if i % 2 else 300 * i), client=f"c{number}")
        for _ in range(pause):
            world.step()
    added = world.count
    world.run(20_000)
    assert len(world.order) + len(world.exhausted) == added
    assert not world.scheduler.shares.counts()


@settings(max_examples=60, deadline=None)
@given(flood=st.integers(1, 40), prompt=st.integers(1, 300), n=st.integers(1, 20), seed=st.integers(0, 100))
def test_a_flood_delays_another_client_by_a_few_steps(flood: int, prompt: int, n: int, seed: int) -> None:
    """However much one client sends, and goes on sending, a short request of another one has its answer soon."""
    world = World(frames=120, max_num_seqs=6, budget=128)
    rng = random.Random(seed)

    def more() -> None:
        leader = None
        for _ in range(n):
            made = world.add(prompt, rng.randint(50, 500), first=1000 * world.count, client="flood", leader=leader)
            leader = leader or made

    for _ in range(flood):
        more()
    for _ in range(rng.randint(1, 30)):
        world.step()
    honest = world.add(60, 10, first=10_000_000, client="honest")
    steps = 0
    while not honest.finished:
        if steps % 5 == 0:
            more()
        world.step()
        steps += 1
        assert steps <= 40, (honest.state, honest.num_output, honest.preemptions)
