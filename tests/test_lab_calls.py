"""Tool calls: reading one, and whether it is right by the published rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import chat_tokenizer, save, tiny_model

from kvbits.errors import ConfigError
from kvbits.evaluation.toolcalls import Called, Case, read_call, read_cases
from kvbits.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save(tiny_model("llama"), tmp_path_factory.mktemp("model"), chat_tokenizer), dtype="float32")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "f", "arguments": {"a": 1}}\n', ("f", {"a": 1})),
        ('{"arguments": {}, "name": "f"} and more', ("f", {})),
        ('{"name": "f", "arguments": {"a": 1}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 3, "arguments": {}}', None),
        ("[1]", None),
        ("", None),
    ],
)
def test_calls_are_read_or_refused(text: str, call: object) -> None:
    assert read_call(text) == call


@pytest.mark.parametrize(
    ("call", "right"),
    [
        (("area", {"base": 10, "height": 5}), True),
        (("area", {"base": 10, "height": 5, "unit": "cm"}), True),
        (("area", {"base": 10, "height": 5, "unit": "m"}), False),
        (("area", {"base": 10}), False),
        (("area", {"base": 10, "height": 5, "colour": "red"}), False),
        (("volume", {"base": 10, "height": 5}), False),
        (None, False),
    ],
)
def test_calls_are_right_by_the_published_answers(call: Any, right: bool) -> None:
    case = Case("q", (1,), {"area": {"base": [10], "height": [5], "unit": ["cm", ""]}})
    assert Called(case, call).right is right


_LISTED = [["Hong Kong", "Rome"], ["Rome", "Hong Kong"]]
_PERSON = [{"name": ["John Doe", "J. Doe"], "born": [1970, ""]}]
_WHERE = [[{"field": ["age"], "value": ["25"]}, {"field": ["job"], "value": ["engineer"]}]]


@pytest.mark.parametrize(
    ("answers", "value", "right"),
    [
        ([1], 1, True),
        ([1], 1.0, False),
        ([1], "1", False),
        ([1], True, False),
        ([True], 1, False),
        ([True, ""], True, True),
        ([1.0], 1, True),
        ([1.0], True, False),
        (["", 9.8], 9.8, True),
        (["", 9.8], "", False),
        (["", 9.8], None, False),
        (["1"], 1, False),
        (["April 1, 2024"], "april 1 2024", True),
        (["x**2"], "X ^ 2", True),
        (["it's"], 'it"s', True),
        (["cm", ""], "", True),
        (["cm", ""], "m", False),
        (_LISTED, ["rome", "Hong-Kong"], True),
        (_LISTED, ["Rome"], False),
        (_LISTED, "Rome", False),
        ([[1.0, 3.0]], [1.0, 3.0], True),
        ([[1.0, 3.0]], [1, 3], False),
        ([["1"]], [1], False),
        (_PERSON, {"name": "j doe", "born": 1970}, True),
        (_PERSON, {"name": "John Doe"}, True),
        (_PERSON, {"born": 1970}, False),
        (_PERSON, {"name": "John Doe", "age": 54}, False),
        (_PERSON, {"name": ["John Doe", "J. Doe"]}, False),
        (_WHERE, [{"field": "age", "value": "25"}, {"field": "Job", "value": "engineer"}], True),
        (_WHERE, [{"field": "job", "value": "engineer"}, {"field": "age", "value": "25"}], False),
        (_WHERE, [{"field": "age", "value": "25"}], False),
    ],
)
def test_an_argument_is_right_by_the_published_rules(answers: list[Any], value: object, right: bool) -> None:
    """As Berkeley's ``ast_checker.py`` has it."""
    case = Case("q", (1,), {"f": {"x": answers}})
    assert Called(case, ("f", {"x": value})).right is right


def test_what_a_function_requires_may_not_be_left_out(loaded: LoadedModel, tmp_path: Path) -> None:
    function = {"name": "f", "parameters": {"properties": {}, "required": ["a"]}}
    question = {"id": "q", "question": [[{"role": "user", "content": "w5"}]], "function": [function]}
    path = tmp_path / "BFCL_simple.json"
    path.write_text(json.dumps(question))
    (tmp_path / "possible_answer").mkdir()
    answers = tmp_path / "possible_answer" / path.name
    answers.write_text(json.dumps({"id": "q", "ground_truth": [{"f": {"a": [True, ""], "b": [1, ""]}}]}))
    (case,) = read_cases(loaded, path, 1, 4096)
    assert Called(case, ("f", {"a": True})).right
    assert not Called(case, ("f", {"b": 1})).right
    answers.write_text(json.dumps({"id": "q", "ground_truth": [{"f": ["a"]}]}))
    with pytest.raises(ConfigError, match=r"the question 'q' .* has no text or no answer"):
        read_cases(loaded, path, 1, 4096)
