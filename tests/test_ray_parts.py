"""What routes and scales a cluster, without one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvbits.cli import cluster
from kvbits.cli.cluster import replicas_of
from kvbits.errors import ConfigError
from kvbits.ray.balance import FULL, ReplicaLoad, choose
from kvbits.ray.metrics import merge
from kvbits.ray.options import ClusterOptions
from kvbits.ray.prefix import BLOCK_CHARS, MAX_BLOCKS, PrefixMap, block_hashes, prompt_text
from kvbits.ray.scaling import ScalingPolicy, replicas_wanted


def chat(*contents: str, **more: object) -> bytes:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return json.dumps({"model": "m", "messages": messages, **more}).encode()


def text_of(body: bytes) -> str:
    text = prompt_text(body)
    assert text is not None
    return text


def test_a_conversation_only_grows_at_its_end() -> None:
    one, two = text_of(chat("hello " * 60)), text_of(chat("hello " * 60, "answer", "more"))
    assert two.startswith(one)
    first, second = block_hashes(one), block_hashes(two)
    assert len(first) == len(one) // BLOCK_CHARS
    assert second[: len(first)] == first


def test_what_does_not_decide_the_tokens_does_not_matter() -> None:
    base = text_of(chat("x" * 300))
    assert text_of(chat("x" * 300, temperature=1, max_tokens=7, stream=True)) == base
    swapped = json.dumps({"messages": [{"content": "x" * 300, "role": "user"}]}).encode()
    assert text_of(swapped) == base
    assert text_of(chat("x" * 300, cache_salt="a")) != base
    assert text_of(chat("x" * 300, tools=[{"type": "function"}])) != base


@pytest.mark.parametrize(
    ("prompt", "same"), [("abc", ["abc", "other"]), ([1, 2, 3], [[1, 2, 3], [4]]), ([12, 3], [[12, 3]])]
)
def test_completions_by_their_first_prompt(prompt: object, same: object) -> None:
    assert text_of(json.dumps({"prompt": prompt}).encode()) == text_of(json.dumps({"prompt": same}).encode())


def test_tokens_are_told_apart() -> None:
    assert text_of(b'{"prompt": [12, 3]}') != text_of(b'{"prompt": [1, 23]}')


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"1", b"{}", b'{"messages": 3}', b'{"prompt": {}}', b"\xff\xfe", b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000, b'{"prompt":' * 20_000, b'{"prompt": "' + b"\\ud800" * 200 + b'"}',
        b'{"prompt": ' + b"1" * 5000 + b"}", b'{"prompt": [' + b"0," * 2_000_000 + b"0]}",
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_body_that_is_no_request_has_no_prompt(body: bytes) -> None:
    assert prompt_text(body) is None


def test_a_huge_prompt_is_known_by_its_beginning() -> None:
    start = "the beginning " * 100_000
    assert len(block_hashes(start)) == MAX_BLOCKS
    assert block_hashes(start + "one") == block_hashes(start + "another")


def test_equal_blocks_after_different_ones_differ() -> None:
    same = "s" * BLOCK_CHARS
    assert block_hashes("a" * BLOCK_CHARS + same)[1] != block_hashes("b" * BLOCK_CHARS + same)[1]


def blocks(seed: int, count: int) -> tuple[bytes, ...]:
    return block_hashes("".join(random.Random(seed).choices("abcdef", k=count * BLOCK_CHARS)))


def test_the_longest_beginning_wins_and_the_dead_hold_nothing() -> None:
    known = PrefixMap(1000)
    text = blocks(0, 15)
    known.record(text[:3], "one")
    known.record(text[:9], "two")
    known.record(text[:5], "three")
    assert known.holder(text, {"one", "two", "three"}) == ("two", True)
    assert known.holder(text, {"one", "three"}) == ("three", False)
    assert known.holder(text[:4], {"one", "two"}) == ("two", False)
    assert known.holder(text[10:], {"one"}) == (None, False)
    assert known.holder((), {"one"}) == (None, False)
    assert known.held == {"one": 3, "two": 9, "three": 5}


def test_a_conversation_that_goes_on_is_told_from_one_that_only_begins_alike() -> None:
    known = PrefixMap(1000)
    system, first, second = "s" * 500, "a" * 300, "b" * 300
    known.record(block_hashes(system + first), "one")
    assert known.holder(block_hashes(system + first + "more" * 50), {"one"}) == ("one", True)
    assert known.holder(block_hashes(system + second), {"one"}) == ("one", False)
    assert known.holder(block_hashes(second), {"one"}) == (None, False)


def test_what_is_long_ago_is_forgotten_the_end_of_a_text_first() -> None:
    known = PrefixMap(10)
    old, new = blocks(1, 8), blocks(2, 8)
    known.record(old, "one")
    known.record(new, "two")
    assert len(known) == 10
    assert known.held == {"one": 2, "two": 8}
    assert known.holder(new, {"one", "two"}) == ("two", True)
    assert known.holder(old[:2], {"one"}) == ("one", False)
    assert known.holder(old[2:], {"one"}) == (None, False)


def test_a_refused_prompt_is_held_by_nobody() -> None:
    known = PrefixMap(1000)
    text = blocks(3, 12)
    known.record(text[:4], "one")
    known.forget(known.record(text, "two"))
    assert len(known) == 4
    assert known.held == {"one": 4, "two": 0}
    # The conversation still ends where it did: asked again, it goes on there.
    assert known.holder(text, {"one", "two"}) == ("one", True)


def test_a_refusal_leaves_what_the_replica_held_before() -> None:
    known = PrefixMap(1000)
    text = blocks(4, 9)
    known.record(text[:6], "one")
    refused = known.record(text, "one")
    known.record(text[:3], "two")
    known.forget(refused)
    assert known.held == {"one": 6, "two": 3}
    assert known.holder(text, {"one", "two"}) == ("one", True)
    known.forget(known.record(text[:6], "one"))
    assert known.held["one"] == 6


@pytest.mark.parametrize(
    ("preferred", "loads", "imbalance", "order"),
    [
        ("b", {"a": ReplicaLoad(0), "b": ReplicaLoad(3)}, 3, ["b", "a"]),
        ("b", {"a": ReplicaLoad(0), "b": ReplicaLoad(4)}, 3, ["a", "b"]),
        (None, {"a": ReplicaLoad(2), "b": ReplicaLoad(1, held=9)}, 3, ["b", "a"]),
        (None, {"a": ReplicaLoad(1, 0.6), "b": ReplicaLoad(1, 0.2, held=9)}, 3, ["b", "a"]),
        (None, {"a": ReplicaLoad(1, 0.5, held=9), "b": ReplicaLoad(1, 0.51, held=2)}, 3, ["b", "a"]),
        (None, {"a": ReplicaLoad(1, FULL), "b": ReplicaLoad(7)}, 3, ["b", "a"]),
        ("a", {"a": ReplicaLoad(1, FULL), "b": ReplicaLoad(7)}, 30, ["b", "a"]),
        ("b", {"a": ReplicaLoad(1, FULL), "b": ReplicaLoad(7, FULL)}, 30, ["b", "a"]),
        ("gone", {"a": ReplicaLoad(0), "b": ReplicaLoad(0, held=1)}, 3, ["a", "b"]),
        (None, {"a": ReplicaLoad(5)}, 3, ["a"]),
        ("a", {}, 3, []),
    ],
)
def test_the_holder_is_first_unless_it_is_overloaded(
    preferred: str | None, loads: dict[str, ReplicaLoad], imbalance: int, order: list[str]
) -> None:
    assert choose(preferred, loads, imbalance, random.Random(0)) == order


def test_of_many_the_better_of_two_is_first() -> None:
    loads = {name: ReplicaLoad(number) for number, name in enumerate("abcdef")}
    rng = random.Random(1)
    firsts = {choose(None, loads, 3, rng)[0] for _ in range(300)}
    assert firsts == set("abcde"), "the most loaded of six is never the better of two"
    assert {choose("c", loads, 2, rng)[0] for _ in range(50)} == {"c"}
    assert len({choose("c", loads, 1, rng)[0] for _ in range(50)}) > 1
    assert all(sorted(choose("c", loads, 2, rng)) == list("abcdef") for _ in range(20))


def test_new_conversations_spread_and_old_ones_return() -> None:
    """The router's rule over time: 60 conversations of 5 turns on 3 replicas, some prompts refused."""
    rng, known = random.Random(2), PrefixMap(100_000)
    under_way: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    texts = ["s" * 200 + "".join(rng.choices("abcdef", k=300)) for _ in range(60)]
    homes: dict[int, str] = {}
    taken: dict[str, int] = dict.fromkeys(under_way, 0)
    moved = 0
    for step in range(300):
        for ends in under_way.values():
            ends[:] = [end for end in ends if end > step]
        # A refused prompt that is longer than all others, again and again to the same replica.
        known.forget(known.record(blocks(1000 + step, 80), "a"))
        number = step % 60
        holder, continues = known.holder(block_hashes(texts[number]), under_way)
        loads = {name: ReplicaLoad(len(ends), 0.0, known.held[name]) for name, ends in under_way.items()}
        best = choose(holder if continues else None, loads, 8, rng)[0]
        moved += homes.setdefault(number, best) != best
        taken[best] += 1
        known.record(block_hashes(texts[number]), best)
        under_way[best].append(step + rng.randint(1, 2))
        texts[number] += "".join(rng.choices("abcdef", k=200))
    assert moved == 0
    assert min(taken.values()) > 0.2 * sum(taken.values()), taken


def test_replicas_by_queue_and_by_usage() -> None:
    assert replicas_wanted(2, 0, [], 16, 0.8) == 0
    assert replicas_wanted(2, 33, [0.1, 0.1], 16, 0.8) == 3
    assert replicas_wanted(2, 1, [0.9, 0.9], 16, 0.8) == 3
    assert replicas_wanted(4, 1, [0.2, 0.2, 0.2, 0.2], 16, 0.8) == 1
    policy = ScalingPolicy(16, 0.8)
    context = SimpleNamespace(
        aggregated_metrics={"kv_usage": {"a": 1.0, "b": 1.0}},
        current_num_replicas=2,
        total_num_requests=100.0,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
    )
    assert policy(context) == (4, {})
    context.total_num_requests, context.aggregated_metrics = 0.0, None
    assert policy(context) == (1, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_replicas": 0}, "0 to 1 replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "3 to 2 replicas"),
        ({"routing": "magic"}, "unknown routing 'magic'; choose from prefix, random"),
        ({"cpus": 0}, "cpus is 0"),
        ({"imbalance": -1}, "imbalance is -1"),
        ({"target_usage": 1.5}, "target_usage is 1.5"),
    ],
)
def test_options_that_cannot_work(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterOptions(**change)  # type: ignore[arg-type]


def test_the_core_does_not_import_ray() -> None:
    code = (
        "import sys, kvbits.cli.main, kvbits.server.app, kvbits.llm, kvbits.ray.options, kvbits.ray.prefix\n"
        "assert 'ray' not in sys.modules, 'ray'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1-4", (1, 4)), (" 3 ", (3, 3))])
def test_replicas_on_the_command_line(text: str, expected: tuple[int, int]) -> None:
    assert replicas_of(text) == expected


@pytest.mark.parametrize("text", ["", "two", "1-", "-1", "1-2-3", "1.5"])
def test_replicas_that_are_no_number(text: str) -> None:
    with pytest.raises(ConfigError, match="ray_replicas is"):
        replicas_of(text)


def test_without_ray_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvbits\[ray\]'"):
        cluster.check_ray(None, None, 30.0)


def test_metrics_of_two_replicas_on_one_page() -> None:
    def page(value: float) -> str:
        registry = CollectorRegistry()
        Counter("vllm:tokens", "Tokens.", ("model_name",), registry=registry).labels("m").inc(value)
        Gauge("kvbits:bits", "Bits.", registry=registry).set(4.5)
        Histogram("vllm:time_seconds", "Time.", registry=registry, buckets=(1, 2)).observe(1.5)
        return generate_latest(registry).decode()

    merged = merge({"a": page(2), "b": page(3)}).decode()
    for family in ("vllm:tokens_total", "kvbits:bits", "vllm:time_seconds"):
        assert merged.count(f"# TYPE {family} ") == 1, merged
    for line in (
        'vllm:tokens_total{model_name="m",replica="a"} 2.0',
        'vllm:tokens_total{model_name="m",replica="b"} 3.0',
        'kvbits:bits{replica="b"} 4.5',
        'vllm:time_seconds_bucket{le="2.0",replica="a"} 1.0',
        'vllm:time_seconds_count{replica="b"} 1.0',
    ):
        assert line in merged.splitlines(), merged
