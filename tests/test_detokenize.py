"""Text that comes piece by piece is the text that comes at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvbits.engine.detokenize import Detokenizer, StopStrings
from kvbits.engine.text import decoder
from kvbits.models.locate import locate


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    source = locate("smollm2-135m")
    return AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf)


def pieces(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    detokenizer = Detokenizer(decoder(SimpleNamespace(tokenizer=tokenizer)))
    shown = [detokenizer.push(token) for token in ids]
    return shown, detokenizer.flush()


WORLD = "Grüße, 世界! 🧑🏽‍🚀 ग्रीष्म — naïve café ﷽ \U0001f469‍\U0001f4bb ½∑ \n\n\tmixed ascii and ὕδωρ 한국어 "


def test_characters_of_many_tokens_appear_whole(tokenizer: Any) -> None:
    ids = tokenizer(WORLD * 3)["input_ids"]
    shown, rest = pieces(tokenizer, ids)
    assert "".join(shown) + rest == WORLD * 3
    assert not any("\ufffd" in piece for piece in shown)
    assert any(piece == "" for piece in shown), "no character spans two tokens: the text is too easy"


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown, rest = pieces(tokenizer, ids)
    assert "".join(shown) + rest == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), min_size=1, max_size=80))
def test_any_tokens(tokenizer: Any, ids: list[int]) -> None:
    # random tokens cut characters in half; special tokens leave no text
    shown, rest = pieces(tokenizer, ids)
    assert "".join(shown) + rest == tokenizer.decode(ids, skip_special_tokens=True)


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look at ever longer beginnings of ``text``; the first that ends with a stop string ends it."""
    for end in range(len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.text("ab\nc", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\nc", min_size=1, max_size=4), max_size=3, unique=True),
)
def test_stop_strings(parts: list[str], stops: list[str]) -> None:
    checker = StopStrings(stops)
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
