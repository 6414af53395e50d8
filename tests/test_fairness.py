"""A short prompt behind a huge one gets its first token soon, and the huge one is not starved."""

from __future__ import annotations

from helpers.scheduling import World


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
