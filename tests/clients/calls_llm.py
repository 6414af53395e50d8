"""llm, Simon Willison's command line and library, through its file of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llm
import pytest
from calls_openai import Person


@pytest.fixture
def chat(url: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    row = {"model_id": "ours", "model_name": model, "api_base": f"{url}/v1", "supports_tools": True,
           "supports_schema": True}  # fmt: skip
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([row]))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return llm.get_model("ours")


def test_prompt(chat: Any) -> None:
    assert chat.prompt("Say hello.", stream=False, max_tokens=20).text()


def test_stream(chat: Any) -> None:
    assert "".join(chat.prompt("Say hello.", stream=True, max_tokens=20))


def test_conversation(chat: Any) -> None:
    talk = chat.conversation()
    assert talk.prompt("Say hello.", max_tokens=20).text()
    assert talk.prompt("Again.", max_tokens=20).text()


def test_schema(chat: Any) -> None:
    Person.model_validate_json(chat.prompt("Ann is 30 and happy.", schema=Person, max_tokens=200).text())


def test_tools(chat: Any) -> None:
    asked = []

    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "22 degrees"

    found = chat.chain(
        "What is the weather in Paris?", tools=[get_weather], options={"temperature": 0, "max_tokens": 200}
    )
    assert found.text()
    assert asked
