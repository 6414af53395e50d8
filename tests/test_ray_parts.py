"""What routes and scales a cluster, without one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvbits.errors import ConfigError
from kvbits.ray.options import ClusterOptions
from kvbits.ray.prefix import BLOCK_CHARS, PrefixMap, block_hashes, choose, prompt_text
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


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"{}", b'{"messages": 3}', b'{"prompt": {}}', b"\xff\xfe"])
def test_a_body_that_is_no_request_has_no_prompt(body: bytes) -> None:
    assert prompt_text(body) is None


def test_lone_surrogates_are_hashed_too() -> None:
    assert len(block_hashes(text_of(b'{"prompt": "' + b"\\ud800" * 200 + b'"}'))) >= 1


def test_equal_blocks_after_different_ones_differ() -> None:
    same = "s" * BLOCK_CHARS
    assert block_hashes("a" * BLOCK_CHARS + same)[1] != block_hashes("b" * BLOCK_CHARS + same)[1]


def test_the_longest_beginning_wins_and_the_dead_hold_nothing() -> None:
    known = PrefixMap(1000)
    blocks = block_hashes("".join(random.Random(0).choices("abcdef", k=2000)))
    known.record(blocks[:3], "one")
    known.record(blocks[:9], "two")
    known.record(blocks[:5], "three")
    assert known.holder(blocks, {"one", "two", "three"}) == ("two", 9)
    assert known.holder(blocks, {"one", "three"}) == ("three", 5)
    assert known.holder(blocks[:4], {"one", "two"}) == ("two", 4)
    assert known.holder(blocks[:2], {"one", "two"}) == ("two", 2)
    assert known.holder(blocks[10:], {"one"}) == (None, 0)
    assert known.holder((), {"one"}) == (None, 0)


def test_what_is_long_ago_is_forgotten_the_end_of_a_text_first() -> None:
    known = PrefixMap(10)
    old, new = (block_hashes(letter * BLOCK_CHARS * 8) for letter in "ab")
    known.record(old, "one")
    known.record(new, "one")
    assert len(known) == 10
    assert known.holder(new, {"one"}) == ("one", 8)
    assert known.holder(old, {"one"}) == ("one", 2)


@pytest.mark.parametrize(
    ("holder", "loads", "imbalance", "order"),
    [
        ("b", {"a": 0, "b": 3, "c": 1}, 3, ["b", "a", "c"]),
        ("b", {"a": 0, "b": 4, "c": 1}, 3, ["a", "c", "b"]),
        (None, {"a": 2, "b": 1}, 3, ["b", "a"]),
        ("gone", {"a": 0, "b": 0}, 3, ["a", "b"]),
        ("a", {}, 3, []),
    ],
)
def test_the_holder_is_first_unless_it_is_much_busier(
    holder: str | None, loads: dict[str, int], imbalance: int, order: list[str]
) -> None:
    assert choose(holder, loads, imbalance) == order


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
        "import sys, kvbits.cli.main, kvbits.server.app, kvbits.engine.llm, kvbits.ray.options, kvbits.ray.prefix\n"
        "assert 'ray' not in sys.modules, 'ray'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
