"""Intervals against textbook formulas, the verdict's rule at its edges, repetition by hand, and the resume_cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvbits.errors import ConfigError
from kvbits.evaluation.bootstrap import Interval, interval
from kvbits.evaluation.repetition import distinct, divergence, loop_length, repeated
from kvbits.evaluation.resume import ResumeCache, key_of
from kvbits.evaluation.verdict import LIMITS, Level, Measure, dominated, judge


def test_an_interval_is_the_normal_one_for_many_independent_differences() -> None:
    values = np.random.default_rng(3).normal(0.7, 2.0, size=900)
    found = interval(values, range(900))
    error = values.std() / 900**0.5
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_differences_of_one_group_are_not_counted_as_independent() -> None:
    """Thirty documents with ten equal differences each know no more than thirty numbers."""
    one = np.random.default_rng(4).normal(size=30)
    alone = interval(one, range(30))
    repeated_ten_times = interval(np.repeat(one, 10), np.repeat(np.arange(30), 10).tolist())
    assert repeated_ten_times.high - repeated_ten_times.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert (repeated_ten_times.items, repeated_ten_times.groups) == (300, 30)
    assert interval(np.repeat(one, 10), range(300)).high < alone.high


def test_few_groups_fall_back_to_single_differences() -> None:
    found = interval([0.0, 1.0] * 10, ["a"] * 10 + ["b"] * 10)
    assert (found.groups, found.low < 0.5 < found.high) == (2, True)


def test_the_same_differences_give_the_same_interval() -> None:
    values = np.random.default_rng(5).normal(size=50)
    assert interval(values, range(50)) == interval(values, range(50))


def measure(kind: str, mean: float, low: float, high: float) -> Measure:
    return Measure(kind, "here", Interval(mean, low, high, 10, 10))


@pytest.mark.parametrize(
    ("mean", "low", "level"),
    [
        (0.0004, 0.0003, Level.NONE),
        (0.0012, 0.0009, Level.NONE),  # the interval reaches the first limit
        (0.0012, 0.0011, Level.SMALL),
        (0.049, 0.04, Level.SMALL),
        (0.06, 0.04, Level.SMALL),  # nor is it certain that it is too much
        (0.06, 0.051, Level.BAD),
        (0.06, 0.0009, Level.NONE),  # nothing is certain
    ],
)
def test_levels_of_kl(mean: float, low: float, level: Level) -> None:
    assert (LIMITS["kl"].none, LIMITS["kl"].bad) == (0.001, 0.05)
    assert measure("kl", mean, low, 2 * mean).level is level


def test_a_few_documents_condemn_nothing() -> None:
    def loss(groups: int) -> Measure:
        return Measure("repetition", "drawn text", Interval(0.2, 0.15, 0.25, 1000, groups))

    assert [loss(groups).level for groups in (1, 7, 8)] == [Level.SMALL, Level.SMALL, Level.BAD]


def test_the_worst_measure_decides_and_says_why() -> None:
    harmless, small = measure("kl", 0.0001, 0.00005, 0.0002), measure("exact", 0.03, 0.01, 0.05)
    bad = measure("perplexity", 0.05, 0.03, 0.07)
    assert judge([harmless]).level.words == "no measurable loss"
    found = judge([harmless, small])
    assert (found.level.words, len(found.reasons)) == ("small loss", 1)
    assert "right answers lost 3 points (1 points to 5 points)" in found.reasons[0]
    found = judge([harmless, small, bad])
    assert found.level.words == "do not use"
    assert "perplexity" in found.reasons[0]
    assert [m["verdict"] for m in found.as_json()["measures"]] == ["no measurable loss", "small loss", "do not use"]


def test_more_bits_for_a_worse_cache_are_not_to_be_used() -> None:
    kl = Interval(0.010, 0.009, 0.011, 10, 10)
    fewer = ("int4", 4.5, Interval(0.004, 0.003, 0.005, 10, 10))
    unsure = ("int3", 3.5, Interval(0.008, 0.006, 0.0095, 10, 10))
    more = ("int8", 8.3, Interval(0.0001, 0.0, 0.0002, 10, 10))
    assert dominated(8.0, kl, [fewer, unsure, more]) == ["int4"]
    found = judge([measure("kl", 0.010, 0.009, 0.011)], ["int4"])
    assert found.level is Level.BAD
    assert "int4 takes no more bits and loses less" in found.reasons[0]


def test_repetition_by_hand() -> None:
    assert repeated([1, 2, 1, 2, 1], 2) == pytest.approx(1 - 2 / 4)
    assert distinct([1, 2, 1, 2, 1], 1) == pytest.approx(2 / 5)
    assert repeated([1, 2], 3) == 0.0
    assert divergence([5, 6, 7], [5, 6, 8]) == 2
    assert divergence([5, 6], [5, 6, 8]) == 2


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([9, 8, 7] + [1, 2, 3, 4] * 6, 4),
        ([5] * 24, 1),
        ([5] * 23, 0),  # too short to be called a loop
        (list(range(100)), 0),
        (list(range(20)) * 3, 20),
        (list(range(20)) * 2, 0),  # said twice only
        ([1, 2, 3, 4] * 6 + [9], 0),  # it got out
    ],
)
def test_loops(tokens: list[int], period: int) -> None:
    assert loop_length(tokens) == period


def test_a_ledger_keeps_each_part(tmp_path: Path) -> None:
    path = tmp_path / "parts.jsonl"
    key = key_of("part", [1, 2], 0.5)
    ResumeCache(path).put(key, [0.1, 1e-17])
    again = ResumeCache(path)
    assert key in again
    assert again[key] == [0.1, 1e-17]
    assert key_of("part", [1, 2], 0.25) not in again


def test_a_ledger_whose_last_line_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "parts.jsonl"
    resume_cache = ResumeCache(path)
    resume_cache.put("a", 1)
    resume_cache.put("b", 2)
    path.write_text(path.read_text()[:-9])
    cut = ResumeCache(path)
    assert "a" in cut
    assert "b" not in cut
    cut.put("b", 3)
    assert ResumeCache(path)["b"] == 3


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael.\nSome years ago\nnever mind how long\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*book.txt"):
        ResumeCache(path)
    for text in ("Call me Ishmael.", '{"kex": 1}', "{}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds something else than finished parts"):
            ResumeCache(path)
        assert path.read_text() == text
    for text in ("{", '{"key', '{"key": "abc", "resu'):
        path.write_text(text)
        ResumeCache(path).put("a", 1)
        assert ResumeCache(path)["a"] == 1
    with pytest.raises(ConfigError, match="cannot use the file"):
        ResumeCache(tmp_path / "none" / "x.jsonl")
