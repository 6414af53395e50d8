"""instructor, in its modes for such a server."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
import pytest
from calls_openai import Person
from conftest import PLAIN
from pydantic import BaseModel, Field

MANY: Any = [{"role": "user", "content": "List these people: Ann is 30 and happy. Bob is 40 and sad."}]
TALK: Any = [{"role": "user", "content": "Ann is 30 years old and happy."}]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    barks: bool


class Pet(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")


def client_of(url: str, mode: instructor.Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)


@pytest.mark.parametrize(
    "mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA]
)
def test_one_object(url: str, model: str, mode: Any) -> None:
    found = client_of(url, mode).chat.completions.create(
        model=model, messages=TALK, response_model=Person, max_tokens=200, temperature=0, max_retries=3
    )
    assert isinstance(found, Person)


def test_parts_as_they_come(url: str, model: str) -> None:
    found = client_of(url, instructor.Mode.TOOLS).chat.completions.create_partial(
        model=model, messages=TALK, response_model=Person, max_tokens=200
    )
    assert list(found)[-1].name


def test_many_objects(url: str, model: str) -> None:
    found = client_of(url, instructor.Mode.JSON_SCHEMA).chat.completions.create(
        model=model, messages=MANY, response_model=list[Person], max_tokens=400, temperature=0, extra_body=PLAIN
    )
    assert found


def test_a_tagged_union(url: str, model: str) -> None:
    talk: Any = [{"role": "user", "content": "My dog barks."}]
    found = client_of(url, instructor.Mode.JSON_SCHEMA).chat.completions.create(
        model=model, messages=talk, response_model=Pet, max_tokens=200, temperature=0
    )
    assert isinstance(found.pet, Cat | Dog)
