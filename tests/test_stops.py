"""Stop strings, found as the text grows, against the plainest definition."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.engine.params import SamplingParams
from kvbits.engine.stops import StopAutomaton, StopStrings


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look at ever longer beginnings of ``text``; the first that ends with a stop string ends it."""
    for end in range(len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


def check(parts: list[str], stops: list[str]) -> None:
    checker = StopStrings(StopAutomaton(stops))
    shown, found = "", None
    whole = ""
    for part in parts:
        text, found = checker.push(part)
        shown += text
        whole += part
        if found is not None:
            break
        # held back: exactly the longest end that may still become a stop string
        held = whole[len(shown) :]
        assert held == max(
            (whole[len(whole) - k :] for s in stops for k in range(len(s)) if whole.endswith(s[:k])),
            key=len,
            default="",
        )
    else:
        shown += checker.flush()
    expected, stop = naive_stop("".join(parts), stops)
    assert (shown, found) == (expected, stop)
    if found is not None:
        # what follows begins anew
        fresh = next(c for c in map(chr, range(0x4E00, 0x9FFF)) if not any(c in s for s in stops))
        assert checker.push(fresh) == (fresh, None)


@settings(max_examples=600, deadline=None)
@given(
    parts=st.lists(st.text("ab\nc", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\nc", min_size=1, max_size=4), max_size=3, unique=True),
)
def test_short_alphabets_where_everything_overlaps(parts: list[str], stops: list[str]) -> None:
    check(parts, stops)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), stops=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=16))
def test_any_characters_and_stops_cut_from_them(data: st.DataObject, stops: list[str]) -> None:
    piece = st.sampled_from(stops).flatmap(lambda s: st.integers(0, len(s)).map(lambda k: s[:k]))
    check(data.draw(st.lists(piece | st.text(max_size=3), max_size=12)), stops)


def test_a_long_periodic_stop_holds_back_no_more_than_it_must() -> None:
    stop = "ab" * 100 + "c"
    checker = StopStrings(StopAutomaton([stop, "ba" * 50 + "x"]))
    assert checker.push("ab" * 99)[0] == ""
    assert checker.push("abab" * 10 + "z")[1] is None
    assert checker.push("") == ("", None)
    assert checker.push(stop) == ("", stop)


def test_the_longest_stops_of_a_request_cost_next_to_nothing_a_token() -> None:
    # One stop string holds back all of the text, the others' beginnings nearly end it: searching for each anew took
    # 6 ms a token. The bound is fifty times what this takes.
    stops = ["a" * 4095 + "b", *("x" * i + "a" * 4080 for i in range(1, 16))]
    checker = StopStrings(SamplingParams(stop=stops).prepare().stops)
    checker.push("a" * 5000)
    begin = time.perf_counter()
    for _ in range(1000):
        checker.push("aaaa")
    assert time.perf_counter() - begin < 0.5


def test_the_sequences_of_a_request_share_what_is_prepared() -> None:
    params = SamplingParams(stop=["x"], logit_bias={3: 1.0}, stop_token_ids=[4], seed=1).prepare()
    other = params.with_seed(2)
    assert (params.seed, other.seed) == (1, 2)
    assert other.stops is params.stops
    assert other.bias is params.bias
    assert other.stop_tokens == {4}
