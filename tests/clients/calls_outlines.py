"""outlines: types, choices, patterns."""

from __future__ import annotations

from typing import Any, Literal

import openai
import outlines
import pytest
from calls_openai import Person


@pytest.fixture
def generate(url: str, model: str) -> Any:
    return outlines.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), model)


@pytest.fixture
def vllm(url: str, model: str) -> Any:
    return outlines.from_vllm(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), model)


def test_text(generate: Any) -> None:
    assert generate("Say hello.", max_tokens=10)


def test_stream(generate: Any) -> None:
    assert "".join(generate.stream("Say hello.", max_tokens=10))


def test_a_type(generate: Any) -> None:
    Person.model_validate_json(generate("Ann is 30 and happy.", Person, max_tokens=200))


@pytest.mark.parametrize(
    "wanted", [Literal["yes", "no"], outlines.regex("[0-9]{3}"), Person], ids=["choice", "regex", "type"]
)
def test_as_vllm(vllm: Any, wanted: Any) -> None:
    found = vllm("Ann is 30 and happy. Is she?", wanted, max_tokens=200)
    if wanted is Person:
        Person.model_validate_json(found)
    else:
        assert found in ("yes", "no") or (len(found) == 3 and found.isdigit())
