"""Text that comes piece by piece is the text that comes at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvbits.engine.detokenize import Detokenizer
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
