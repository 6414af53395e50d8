"""The traffic simulation against the real scheduler and page manager, and what must hold in any case."""

from __future__ import annotations

import random

import pytest

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.engine.params import SamplingParams
from kvbits.engine.request import FinishReason, Request
from kvbits.engine.scheduler import Scheduler
from kvbits.pages import PageManager
from kvbits.planning.outcome import SimulationResult
from kvbits.planning.simulate import EngineLimits, simulate
from kvbits.planning.timing import Machine, StepTime
from kvbits.traces import Arrival

LAYER = LayerGeometry(4, 2, 64, 64, 0.125)
MODEL = ModelGeometry("a model", (LAYER,) * 6, 1 << 20, 1000)


class Constant(StepTime):
    """Every step takes a second."""

    def seconds(self, decodes: int, decode_context: float, prefill: float, prefill_context: float) -> float:
        return 1.0


SECOND = Constant(Machine(1, 1), 0, 0, MODEL, 0)


def layout(dtype: str) -> PoolLayout:
    return PoolLayout.of(MODEL, parse_policy(dtype, MODEL.num_layers))


def random_trace(seed: int, count: int, gap: float, prompt: int, answer: int, shared: bool) -> list[Arrival]:
    """Requests of which every second continues the one before it, where ``shared``; those are of whole blocks."""
    rng, time, found, last = random.Random(seed), 0.0, [], ()
    for index in range(count):
        time += rng.expovariate(1 / gap)
        size = rng.randint(1, prompt)
        blocks = tuple(1000 * index + i for i in range(-(-size // 512)))
        if shared and index % 2 and last:
            blocks = (*last, *blocks)
        size = 512 * len(blocks) if shared else size
        last = blocks
        found.append(Arrival(time, size, rng.randint(1, answer), blocks if shared else ()))
    return found


def tokens_of(arrival: Arrival, index: int) -> list[int]:
    """Prompt tokens that are equal exactly where the blocks are."""
    if not arrival.blocks:
        return [(index << 20) + i for i in range(arrival.prompt)]
    return [(arrival.blocks[i // 512] << 10) + i % 512 for i in range(arrival.prompt)]


def really(trace: list[Arrival], pool: PoolLayout, num_frames: int, limits: EngineLimits) -> dict[str, float]:
    """The engine's scheduler and page manager, one step a second, with made-up tokens."""
    pages = PageManager(num_frames, pool.open.frames, pool.sealed.frames)
    capacity = pool.full_pages(num_frames) * 64 + 63
    scheduler = Scheduler(pages, capacity, limits.max_num_seqs, limits.max_num_batched_tokens)
    coming, arrivals = list(enumerate(trace))[::-1], {}
    time, waits, preemptions, cached, peak = 0.0, [], 0, 0, 0
    seen: set[int] = set()
    while coming or scheduler.running or scheduler.waiting:
        while coming and coming[-1][1].time <= time:
            index, arrival = coming.pop()
            request = Request(index, tokens_of(arrival, index), SamplingParams(max_tokens=arrival.answer))
            arrivals[index] = arrival
            scheduler.add(request)
        plan = scheduler.schedule()
        assert not plan.exhausted
        preemptions += len(plan.preempted)
        if not plan.works:
            time = max(time, coming[-1][1].time) if coming and not scheduler.running else time + 1
            continue
        for work in plan.works:
            request = work.request
            if request.seq_id not in seen:
                seen.add(request.seq_id)
                waits.append(time - arrivals[request.seq_id].time)
                cached += request.cached or 0
        time += 1
        peak = max(peak, len(scheduler.running))
        for work in plan.works:
            request, end = work.request, work.start + work.count
            pages.commit(request.seq_id, request.tokens[work.start : end])
            request.computed = end
            if work.samples:
                request.tokens.append((1 << 50) + (request.seq_id << 20) + end)
                if request.num_output == arrivals[request.seq_id].answer:
                    request.finish(FinishReason.LENGTH)
                    scheduler.remove(request)
    pages.check()
    return {
        "seconds": time,
        "wait": sum(waits) / len(waits),
        "preemptions": preemptions,
        "cached": cached,
        "peak": peak,
    }


def simulated(trace: list[Arrival], pool: PoolLayout, num_frames: int, limits: EngineLimits) -> SimulationResult:
    return simulate(trace, pool, num_frames, pool.full_pages(num_frames) * 64 + 63, SECOND, limits)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("seed", [1, 2])
def test_without_pressure_it_is_the_scheduler_step_for_step(dtype: str, seed: int) -> None:
    trace = random_trace(seed, 25, 30.0, 700, 150, shared=False)
    limits = EngineLimits(max_num_seqs=64, max_num_batched_tokens=256)
    real, found = really(trace, layout(dtype), 4000, limits), simulated(trace, layout(dtype), 4000, limits)
    assert found.seconds == pytest.approx(real["seconds"], abs=2)
    assert found.peak_running == real["peak"]
    assert found.as_json()["preemptions"] == real["preemptions"] == 0
    assert found.as_json()["wait_mean_s"] == pytest.approx(real["wait"], abs=1.0)


@pytest.mark.parametrize(("dtype", "frames"), [("bf16", 70), ("int8", 80), ("int4", 90)])
def test_under_pressure_it_waits_and_preempts_as_the_scheduler_does(dtype: str, frames: int) -> None:
    """Answers are long against prompts, so that sequences outgrow the pool after they were admitted."""
    limits = EngineLimits(max_num_seqs=64, max_num_batched_tokens=256)
    real_waits, waits, real_preemptions, preemptions, seconds = 0.0, 0.0, 0.0, 0, []
    for seed in range(3):
        trace = random_trace(seed, 40, 25.0, 600, 700, shared=False)
        real, found = really(trace, layout(dtype), frames, limits), simulated(trace, layout(dtype), frames, limits)
        seconds.append((found.seconds, real["seconds"]))
        real_waits, waits = real_waits + real["wait"], waits + found.as_json()["wait_mean_s"]
        real_preemptions, preemptions = (
            real_preemptions + real["preemptions"],
            preemptions + sum(s.preemptions for s in found.served),
        )
    assert real_preemptions > 10
    assert preemptions == pytest.approx(real_preemptions, rel=0.25)
    assert waits == pytest.approx(real_waits, rel=0.1)
    for mine, real_seconds in seconds:
        assert mine == pytest.approx(real_seconds, rel=0.1)


@pytest.mark.parametrize("frames", [4000, 100, 80])
def test_shared_prefixes_are_found_as_the_prefix_cache_finds_them(frames: int) -> None:
    trace = random_trace(7, 40, 40.0, 2000, 60, shared=True)
    limits = EngineLimits(max_num_seqs=64, max_num_batched_tokens=512)
    real, found = really(trace, layout("int4"), frames, limits), simulated(trace, layout("int4"), frames, limits)
    assert real["cached"] > 10_000
    assert found.cached_tokens == real["cached"]
    assert found.as_json()["wait_mean_s"] == pytest.approx(real["wait"])


def test_short_prompts_overtake_huge_ones_as_in_the_scheduler() -> None:
    rng, time, trace = random.Random(3), 0.0, []
    for _ in range(40):
        time += rng.expovariate(1 / 15)
        trace.append(Arrival(time, rng.choice([100, 150, 300, 6000]), rng.randint(1, 60), ()))
    limits = EngineLimits(max_num_seqs=64, max_num_batched_tokens=256)
    real, found = really(trace, layout("int4"), 4000, limits), simulated(trace, layout("int4"), 4000, limits)
    assert found.seconds == pytest.approx(real["seconds"], abs=1)
    assert found.as_json()["wait_mean_s"] == pytest.approx(real["wait"], abs=1.0)


@pytest.mark.parametrize("frames", [30, 60, 200])
def test_everything_ends_and_every_frame_comes_back(frames: int) -> None:
    trace = random_trace(3, 50, 5.0, 900, 300, shared=True)
    pool = layout("int4+sink:int8")
    longest = pool.full_pages(frames) * 64 + 63
    told: list[int] = []
    found = simulate(trace, pool, frames, longest, SECOND, EngineLimits(32, 256), progress=told.append)
    fits = [a for a in trace if a.prompt <= longest]
    report = found.as_json()
    assert sum(told) == len(trace)
    assert report["refused"] == len(trace) - len(fits)
    assert report["answer_tokens"] == sum(min(a.answer, longest - a.prompt + 1) for a in fits)
    assert 0 < report["mean_use"] <= report["peak_use"] <= 1
    for served in found.served:
        if served.finished is not None:
            assert served.admitted is not None
            assert served.first_token is not None
            assert served.arrived <= served.admitted < served.first_token <= served.finished


def test_more_load_and_fewer_bits_do_what_they_should() -> None:
    trace = random_trace(7, 150, 12.0, 1500, 300, shared=False)
    memory = 400 * layout("bf16").frame_bytes
    waits = {}
    for dtype in ("bf16", "int8", "int4"):
        pool = layout(dtype)
        frames = memory // pool.frame_bytes
        for load in (1.0, 4.0):
            found = simulate(
                trace, pool, frames, pool.full_pages(frames) * 64 + 63, SECOND, EngineLimits(256, 512), load
            )
            waits[dtype, load] = found.as_json()["wait_mean_s"]
    for dtype in ("bf16", "int8", "int4"):
        assert waits[dtype, 4.0] > waits[dtype, 1.0]
    assert waits["bf16", 4.0] > waits["int8", 4.0] > waits["int4", 4.0]


def test_step_time_is_the_longer_of_bytes_and_arithmetic() -> None:
    step = StepTime(Machine(1e9, 1e12), 2e9, 1e9, MODEL, 1000)
    # one sequence of a million tokens: weights and cache, 3 GB
    assert step.seconds(1, 1e6, 0, 0) == pytest.approx(3.0)
    attention = 6 * 2 * 4 * 128 * 500
    assert step.seconds(0, 0, 5000, 500) == pytest.approx((2 * 1e9 + attention) * 5000 / 1e12)
