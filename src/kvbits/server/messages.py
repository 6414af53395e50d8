"""From OpenAI's messages to plain ones, which a chat template is then fitted with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from kvbits.errors import RequestError
from kvbits.server.body import count_values
from kvbits.server.protocol.chat import (
    AnswerContent,
    AssistantMessage,
    Content,
    Message,
    TextPart,
    Tool,
    ToolMessage,
)

Plain = dict[str, Any]

MAX_ARGUMENTS = 1 << 17
"""Values that the arguments of all calls of a conversation may hold."""


def plain_tools(tools: Sequence[Tool]) -> list[Plain]:
    """Tool definitions as templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def plain_messages(messages: Sequence[Message]) -> list[Plain]:
    """The messages as :meth:`kvbits.server.templates.ChatTemplate.fit` takes them.

    Raises ``RequestError`` for arguments of a call that are not JSON.
    """
    _check_calls(messages)
    return [_plain(message, place) for place, message in enumerate(messages)]


def _plain(message: Message, place: int) -> Plain:
    role = "system" if message.role == "developer" else message.role
    found: Plain = {"role": role, "content": plain_text(message.content)}
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, AssistantMessage):
        reasoning = message.reasoning_content or message.reasoning
        if isinstance(reasoning, str):
            found["reasoning_content"] = reasoning
        if message.tool_calls:
            found["tool_calls"] = [
                {"id": call.id, "name": call.function.name, "arguments": _arguments(call.function.arguments, place, n)}
                for n, call in enumerate(message.tool_calls)
            ]
    elif isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    return found


def plain_text(content: Content | AnswerContent | None) -> str:
    """The text of a message, its parts joined."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _check_calls(messages: Sequence[Message]) -> None:
    """Raise ``ApiError`` where the arguments of all calls are more than may be made objects of."""
    left = MAX_ARGUMENTS
    for message in messages:
        for call in (message.tool_calls or ()) if isinstance(message, AssistantMessage) else ():
            left -= count_values(call.function.arguments.encode(), left)


def _arguments(text: str, message: int, call: int) -> Any:
    try:
        return from_json(text, allow_inf_nan=False) if text.strip() else {}
    except ValueError as error:
        where = f"messages.{message}.tool_calls.{call}.function.arguments"
        raise RequestError(f"the arguments of a tool call are not JSON: {error}", where) from error
