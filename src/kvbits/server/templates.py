"""What a model's chat template can do, found by trying it once, and conversations made fit for it.

Templates differ in what they refuse: a system message, two calls at once, ids of another length, arguments as text or
as an object. What the template has no place for becomes part of a turn that it has.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from kvbits.engine.text import end_tokens, special_tokens
from kvbits.models import LoadedModel
from kvbits.server.callformat import (
    HERMES,
    ID,
    PROBE_IDS,
    PROBE_NAME,
    PROBE_VALUE,
    CallFormat,
    derive,
    probe_call,
    probe_tool,
)

Plain = dict[str, Any]

_INSTRUCTIONS = (
    "You may call one or more functions to help the user. Their signatures are between <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "For each call, answer with its name and its arguments, a JSON object, like this:\n{call}"
)
_ASK: Plain = {"role": "user", "content": "probe question"}
_LONG_ID = "call_0123456789abcdef01234567"
_SHORT = re.compile("[a-zA-Z0-9]{9}")
_LETTERS = string.ascii_letters + string.digits


class ChatTemplate:
    """The template of one tokenizer. Every property is found when it is first asked for."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        given = getattr(loaded.tokenizer, "chat_template", None) or ""
        self.text = "\n".join(given.values()) if isinstance(given, dict) else str(given)

    def knows(self, name: str) -> bool:
        """Whether the template reads a variable of this name."""
        return re.search(rf"\b{re.escape(name)}\b", self.text) is not None

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is shown."""
        messages = [{"role": "system", "content": "probe rule"}, _ASK]
        return self._shows("probe rule", messages) or self._shows("probe rule", messages, tools=[probe_tool()])

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the definitions of tools are shown."""
        return self._shows(PROBE_NAME, [_ASK], tools=[probe_tool()])

    @cached_property
    def needs_descriptions(self) -> bool:
        """Whether it fails on a tool without description or parameters."""
        return self.takes_tools and not self._shows(PROBE_NAME, [_ASK], tools=[probe_tool(described=False)])

    @cached_property
    def arguments_as_text(self) -> bool | None:
        """Whether arguments of calls must be text rather than objects; ``None``: it shows no calls."""
        found = self._render_calls([probe_call(PROBE_IDS[0])])
        if found is not None and f"'{PROBE_VALUE}'" not in found:
            return False
        # Only joined to other text, or in Python's notation.
        return True if self._shows_calls([probe_call(PROBE_IDS[0], as_text=True)]) else None if found is None else False

    @cached_property
    def takes_several(self) -> bool:
        """Whether a turn may hold more than one call."""
        return self._shows_calls([probe_call(name, bool(self.arguments_as_text)) for name in PROBE_IDS])

    @cached_property
    def short_ids(self) -> bool:
        """Whether ids of calls must be nine letters and digits."""
        if self.arguments_as_text is None:
            return False
        return not self._shows_calls([probe_call(_LONG_ID, self.arguments_as_text)])

    @cached_property
    def format(self) -> CallFormat:
        """How the model writes calls."""
        return HERMES if self.arguments_as_text is None else self._format_of(self.arguments_as_text) or HERMES

    @cached_property
    def marks(self) -> tuple[int, ...]:
        """The special tokens that its format of calls has; a parser must see them."""
        tokenizer: Any = self._loaded.tokenizer
        names = {str(tokenizer.convert_ids_to_tokens(token)): token for token in special_tokens(self._loaded)}
        return tuple(token for name, token in names.items() if any(name in text for text in self.format.texts))

    def tools(self, tools: Sequence[Plain]) -> list[Plain]:
        """Definitions as the template takes them; none where it takes none."""
        if not self.takes_tools:
            return []
        return [_described(tool) for tool in tools] if self.needs_descriptions else list(tools)

    def fit(self, messages: Sequence[Plain], tools: Sequence[Plain]) -> list[Plain]:
        """A conversation as the template takes it. Calls have ``id``, ``name`` and ``arguments`` (an object)."""
        native = self.arguments_as_text is not None
        found = [dict(message) for message in messages]
        if tools and not self.takes_tools:
            found = self._with_instructions(found, tools)
        found = self._native_calls(found) if native else _calls_as_text(found)
        return found if self.takes_system else _system_into_user(found)

    def _with_instructions(self, messages: list[Plain], tools: Sequence[Plain]) -> list[Plain]:
        form = self.format
        call = f"{form.prefix}<function name>{form.middle}<arguments object>{form.suffix}".replace(ID, "<id>")
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool) for tool in tools), call=call)
        if messages and messages[0]["role"] == "system":
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def _native_calls(self, messages: list[Plain]) -> list[Plain]:
        names = {call["id"]: call["name"] for message in messages for call in message.get("tool_calls", ())}
        found: list[Plain] = []
        for message in messages:
            if message.get("tool_calls"):
                message = {**message, "tool_calls": [self._native(call) for call in message["tool_calls"]]}
            elif message["role"] == "tool":
                message.setdefault("name", names.get(message["tool_call_id"], ""))
                if not message["name"]:
                    del message["name"]
                message["tool_call_id"] = self._id(message["tool_call_id"])
            found.append(message)
        return found if self.takes_several else _one_by_one(found)

    def _native(self, call: Plain) -> Plain:
        arguments = json.dumps(call["arguments"]) if self.arguments_as_text else call["arguments"]
        function = {"name": call["name"], "arguments": arguments}
        return {"id": self._id(call["id"]), "type": "function", "function": function}

    def _id(self, given: str) -> str:
        """The id as the family writes it: another one always becomes the same."""
        if not self.short_ids or _SHORT.fullmatch(given):
            return given
        digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
        return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:9])

    def _format_of(self, as_text: bool) -> CallFormat | None:
        start = self._render([_ASK], tools=[probe_tool()], add_generation_prompt=True)
        one, two = (
            self._render([_ASK, _answer([probe_call(name, as_text) for name in PROBE_IDS[:count]])],
                         tools=[probe_tool()])
            for count in (1, 2)
        )  # fmt: skip
        if start is None or one is None:
            return None
        tokenizer: Any = self._loaded.tokenizer
        ends = [str(tokenizer.convert_ids_to_tokens(token)) for token in end_tokens(self._loaded)]
        said = self._render([_ASK, {"role": "assistant", "content": "probe answer"}], tools=[probe_tool()]) or ""
        return derive(start, one, two, [*ends, said.partition("probe answer")[2].strip()])

    def _shows_calls(self, calls: list[Plain]) -> bool:
        return self._render_calls(calls) is not None

    def _render_calls(self, calls: list[Plain]) -> str | None:
        """What the template makes of calls and their results, if it shows them all."""
        results = [
            {"role": "tool", "tool_call_id": call["id"], "name": PROBE_NAME, "content": f"probe result {i}"}
            for i, call in enumerate(calls)
        ]
        found = self._render([_ASK, _answer(calls), *results], tools=[probe_tool()])
        if found is None or any(f"probe result {i}" not in found for i in range(len(calls))):
            return None
        return found if found.count(PROBE_VALUE) >= len(calls) else None

    def _shows(self, what: str, messages: list[Plain], **options: Any) -> bool:
        found = self._render(messages, **options)
        return found is not None and what in found

    def _render(self, messages: list[Plain], **options: Any) -> str | None:
        try:
            return str(self._loaded.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        # A template is a program of the model's author: it raises what it likes.
        except Exception:
            return None


def _answer(calls: list[Plain]) -> Plain:
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _described(tool: Plain) -> Plain:
    function = tool["function"]
    parameters = function.get("parameters") or {"type": "object"}
    fields = {
        name: {"description": "", **field} if isinstance(field, dict) else field
        for name, field in (parameters.get("properties") or {}).items()
    }
    return {**tool, "function": {"description": "", **function, "parameters": {**parameters, "properties": fields}}}


def _calls_as_text(messages: list[Plain]) -> list[Plain]:
    """Calls and results in Hermes' tags; results that follow each other are one user's turn."""
    found: list[Plain] = []
    for before, message in zip([None, *messages], messages, strict=False):
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before is not None and before["role"] == "tool":
                found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n{text}"}
            else:
                found.append({"role": "user", "content": text})
            continue
        calls = message.pop("tool_calls", ())
        if calls:
            parts = [message["content"]] if message["content"] else []
            for call in calls:
                said = json.dumps({"name": call["name"], "arguments": call["arguments"]})
                parts.append(f"<tool_call>\n{said}\n</tool_call>")
            message["content"] = "\n".join(parts)
        found.append(message)
    return found


def _one_by_one(messages: list[Plain]) -> list[Plain]:
    """Each call of a turn in a turn of its own, with its result behind it."""
    found: list[Plain] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            found.append(message)
            continue
        results: list[Plain] = []
        while place < len(messages) and messages[place]["role"] == "tool":
            results.append(messages[place])
            place += 1
        for number, call in enumerate(calls):
            found.append({**message, "content": message["content"] if number == 0 else "", "tool_calls": [call]})
            found += [result for result in results if result["tool_call_id"] == call["id"]]
        known = {call["id"] for call in calls}
        found += [result for result in results if result["tool_call_id"] not in known]
    return found


def _system_into_user(messages: list[Plain]) -> list[Plain]:
    """What system messages say begins the user's turn that follows."""
    found: list[Plain] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            found.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            found.append(message)
    return [*found, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else found
