"""JSON schemas made fit for a grammar: all that the grammar lets through is valid for the schema as it was given."""

from __future__ import annotations

import json
import random
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from helpers.serving import byte_model, byte_tokenizer
from pydantic import BaseModel, Field

from kvbits.engine.grammar import GrammarCompiler
from kvbits.engine.schemas import LARGEST, fit
from kvbits.errors import RequestError


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    indoors: bool


class Dog(BaseModel):
    kind: Literal["dog", "wolf"] = "dog"
    tame: bool | None = None


class Owner(BaseModel):
    """A tag with a default need not be there, as Pydantic describes it: without it both might be meant."""

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind"], "additionalProperties": False,
}  # fmt: skip
DOG = {
    "type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}, "tame": {"type": "boolean"}},
    "required": ["kind", "tame"], "additionalProperties": False,
}  # fmt: skip
COUNTRY = {
    "type": "object", "properties": {"land": {"enum": ["US", "NL"]}, "code": {"type": "string"}},
    "required": ["land", "code"], "additionalProperties": False, "if": {"properties": {"land": {"const": "US"}}},
    "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
    "else": {"properties": {"code": {"pattern": "^[A-Z]{2}$"}}},
}  # fmt: skip
COLOURS = {"enum": ["red", "green", "blue"]}
PAIRS = {"type": "boolean"}
DONE: dict[str, dict[str, Any]] = {
    "tagged": {"$defs": {"Cat": CAT, "Dog": DOG},
               "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "kind"}},
    "unique": {"type": "array", "items": COLOURS, "uniqueItems": True, "minItems": 1},
    "unique, bounded": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 1},
    "names": {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": PAIRS},
    "names by pattern": {"type": "object", "propertyNames": {"pattern": "^[xy]{1,2}$"}, "additionalProperties": PAIRS,
                         "maxProperties": 2},
    "condition": COUNTRY,
    "not a value": {"enum": ["a", "b", 3], "not": {"enum": ["b", 5]}},
    "not a type": {"type": ["boolean", "null"], "not": {"type": "null"}},
    "inside": {"type": "object", "required": ["x", "y"], "additionalProperties": False,
               "properties": {"x": {"type": "array", "items": COLOURS, "uniqueItems": True}, "y": COUNTRY}},
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_model())


def written(compiler: GrammarCompiler, schema: Any, seed: int, most: int = 600) -> str:
    """A text that any model might write: each byte is drawn among those that the grammar allows."""
    drawn, matcher, found = random.Random(seed), compiler.json_schema(schema).start(), b""
    end = byte_tokenizer().eos_token_id
    while not matcher.finished:
        allowed = matcher.allowed().nonzero().flatten().tolist()
        token = drawn.choice(allowed)
        matcher.accept(token)
        found += b"" if token == end else compiler.token_bytes(token)
        assert len(found) < most, found
    return found.decode()


@pytest.mark.parametrize("name", DONE)
def test_what_is_written_is_valid_for_the_schema_as_it_was_given(compiler: GrammarCompiler, name: str) -> None:
    schema, seen = DONE[name], set()
    for seed in range(25):
        value = json.loads(written(compiler, schema, seed))
        jsonschema.Draft202012Validator(schema).validate(value)
        seen.add(json.dumps(value))
    # A grammar that lets one value through would be valid too.
    assert len(seen) >= (1 if name == "not a type" else 2), seen


def accepts(compiler: GrammarCompiler, schema: Any, value: Any) -> bool:
    matcher = compiler.json_schema(schema).start()
    names = {compiler.token_bytes(token): token for token in range(3, 259)}
    for byte in json.dumps(value, separators=(",", ":")).encode():
        token = names[bytes([byte])]
        if matcher.finished or not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return matcher.finished or bool(matcher.allowed()[byte_tokenizer().eos_token_id])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tagged", {"kind": "cat", "lives": 9}), ("tagged", {"kind": "wolf", "tame": False}),
        ("unique", ["red", "blue"]), ("unique", ["red", "green", "blue"]), ("unique, bounded", []),
        ("names", {}), ("names", {"a": True, "b": False}), ("names by pattern", {"xy": True}),
        ("condition", {"land": "US", "code": "12345"}), ("condition", {"land": "NL", "code": "AB"}),
        ("not a value", 3), ("not a type", False),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_schema_is_for_can_still_be_written(compiler: GrammarCompiler, name: str, value: Any) -> None:
    jsonschema.validate(value, DONE[name])
    assert accepts(compiler, DONE[name], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tagged", {"kind": "cat", "tame": True}), ("tagged", {"lives": 1}), ("unique", ["red", "red"]), ("unique", []),
        ("names", {"c": True}), ("condition", {"land": "US", "code": "AB"}),
        ("condition", {"land": "NL", "code": "12345"}), ("not a value", "b"), ("not a type", None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_cannot_be_written(compiler: GrammarCompiler, name: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, DONE[name])
    assert not accepts(compiler, DONE[name], value)


def test_unions_as_pydantic_describes_them(compiler: GrammarCompiler) -> None:
    schema = Owner.model_json_schema()
    for pet in ({"kind": "cat", "indoors": True}, {"kind": "wolf"}, {"kind": "dog", "tame": None}):
        Owner.model_validate({"pet": pet})
        assert accepts(compiler, schema, {"pet": pet})
    for pet in ({"kind": "cat"}, {"kind": "cow"}, {"kind": "dog", "tame": 5}):
        assert not accepts(compiler, schema, {"pet": pet})


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 3}},
        {"not": {"type": "object", "properties": {"a": {"const": 1}}}}, {"type": "number", "not": {"type": "integer"}},
        {"if": {"properties": {"n": {"minimum": 5}}}, "then": {"required": ["m"]}},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_said_is_refused(compiler: GrammarCompiler, schema: Any) -> None:
    with pytest.raises(RequestError, match="the schema cannot be used"):
        compiler.json_schema(schema)


@pytest.mark.parametrize("wanted", [" ", "\n", "0", "9"])
def test_blanks_and_digits_do_not_run_on_for_ever(compiler: GrammarCompiler, wanted: str) -> None:
    """The worst writer: one that repeats itself wherever it may."""
    kinds = ("integer", "number") if wanted.isdigit() else ("integer", "string", "boolean")
    for kind in kinds:
        schema = {"type": "array", "items": {"type": kind}, "minItems": 1}
        token = next(t for t in range(3, 259) if compiler.token_bytes(t) == wanted.encode())
        matcher, run, longest = compiler.json_schema(schema).start(), 0, 0
        for _ in range(200):
            allowed = matcher.allowed()
            chosen = token if allowed[token] else int(allowed.nonzero()[-1])
            run = run + 1 if chosen == token else 0
            longest = max(longest, run)
            matcher.accept(chosen)
            if matcher.finished:
                break
        # sixteen blanks, the digits of a double's integers, and nine behind the point
        assert 0 < longest <= 17, kind


@pytest.mark.parametrize("value", [0, -1, 1.5, 123456789.5, LARGEST, -LARGEST, "", "a b", "two\nlines"], ids=repr)
def test_usual_values_are_within_the_bounds(compiler: GrammarCompiler, value: Any) -> None:
    kind = "string" if isinstance(value, str) else "number"
    assert accepts(compiler, {"type": kind}, value)
    if isinstance(value, int):
        assert accepts(compiler, {"type": "integer"}, value)


def test_a_schema_without_any_of_it_stays_as_it_is() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}, "b": {"type": "string", "maxLength": 3}}}
    assert fit(schema) == schema
