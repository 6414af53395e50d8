"""From OpenAI's messages to what chat templates take.

A template that knows nothing of tools gets them as text, in the format that models of the Hermes kind were trained on:
definitions in the system message, calls and results in ``<tool_call>`` and ``<tool_response>``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from kvbits.errors import RequestError
from kvbits.server.body import count_values
from kvbits.server.protocol.chat import AssistantMessage, Content, Message, RefusalPart, TextPart, Tool, ToolMessage

Plain = dict[str, Any]

MAX_ARGUMENTS = 1 << 17
"""Values that the arguments of all calls of a conversation may hold."""

_INSTRUCTIONS = (
    "You may call one or more functions to help the user. Their signatures are between <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "For each call, answer with its name and arguments as a JSON object between <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": <function name>, "arguments": <arguments object>}}\n</tool_call>'
)


def plain_tools(tools: Sequence[Tool]) -> list[Plain]:
    """Tool definitions as templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def plain_messages(messages: Sequence[Message], tools: Sequence[Plain], template: str) -> list[Plain]:
    """The messages as ``template`` takes them. Raises ``RequestError`` for arguments of a call that are not JSON."""
    knows_tools = "tools" in template
    _check_calls(messages)
    plain: list[Plain] = []
    for message in messages:
        plain.append(_plain(message, as_text=not knows_tools))
    if tools and not knows_tools:
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool) for tool in tools))
        if plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0]['content']}\n\n{text}"
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def _plain(message: Message, as_text: bool) -> Plain:
    role = "system" if message.role == "developer" else message.role
    found: Plain = {"role": role, "content": _text(message.content)}
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            found["reasoning_content"] = message.reasoning_content
        calls = [{"name": c.function.name, "arguments": _arguments(c.function.arguments)}
                 for c in message.tool_calls or ()]  # fmt: skip
        if calls and as_text:
            parts = [found["content"]] if found["content"] else []
            parts += [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
            found["content"] = "\n".join(parts)
        elif calls:
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    elif isinstance(message, ToolMessage):
        if as_text:
            return {"role": "user", "content": f"<tool_response>\n{found['content']}\n</tool_response>"}
        found["tool_call_id"] = message.tool_call_id
    return found


def _text(content: Content | list[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _check_calls(messages: Sequence[Message]) -> None:
    """Raise ``ApiError`` where the arguments of all calls are more than may be made objects of."""
    left = MAX_ARGUMENTS
    for message in messages:
        for call in (message.tool_calls or ()) if isinstance(message, AssistantMessage) else ():
            left -= count_values(call.function.arguments.encode(), left)


def _arguments(text: str) -> Any:
    try:
        return from_json(text, allow_inf_nan=False) if text.strip() else {}
    except ValueError as error:
        raise RequestError(f"the arguments of a tool call are not JSON: {error}") from error
