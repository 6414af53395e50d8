"""``/v1/messages``, Anthropic's shape: the request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictStr, Tag

from kvbits.server.protocol.base import Integer, Items, Lenient, Strict, Text, TextOrList
from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.protocol.items import ChatLike, chat_of, known_types


class TextBlock(Lenient):
    """A piece of text."""

    type: Literal["text"]
    text: StrictStr


class UseBlock(Lenient):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: dict[StrictStr, Any]


Texts = Annotated[Text | Annotated[Items[Annotated[TextBlock, known_types("text")]], Tag("<list>")], TextOrList]


class ResultBlock(Lenient):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: Texts | None = None


class ThoughtBlock(Lenient):
    """What a model thought; models here get none of it back."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[
    Annotated[TextBlock | UseBlock | ResultBlock | ThoughtBlock, Field(discriminator="type")],
    known_types("text", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]


class Turn(Lenient):
    """A message of the user or the assistant."""

    role: Literal["user", "assistant"]
    content: Annotated[Text | Annotated[Items[Block], Tag("<list>")], TextOrList]


class MessageTool(Lenient):
    """A function that the model may call."""

    type: Literal["custom"] = "custom"
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    input_schema: dict[StrictStr, Any]


class MessageToolChoice(Strict):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class MessageMetadata(Strict):
    """``metadata``."""

    user_id: StrictStr | None = None


class SchemaFormat(Strict):
    """What the answer's text must be: JSON that a schema describes."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[StrictStr, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """``output_config``."""

    format: SchemaFormat | None = None
    effort: StrictStr | None = None


class CountRequest(Strict):
    """The body of ``/v1/messages/count_tokens``: what makes the prompt."""

    model: StrictStr | None = None
    messages: Annotated[Items[Turn], Field(min_length=1)]
    system: Texts | None = None
    tools: Items[Annotated[MessageTool, known_types("custom")]] | None = None
    tool_choice: MessageToolChoice | None = None

    def prompt_fields(self) -> dict[str, Any]:
        """These fields for a chat."""
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        for turn in self.messages:
            messages += _turn(turn)
        tools = None if self.tools is None else [_tool(tool) for tool in self.tools]
        return {"messages": messages, "tools": tools, **_choice(self.tool_choice)}


class MessagesRequest(ChatLike, CountRequest):
    """The body of ``/v1/messages``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
        "thinking": ({"type": "disabled"},),
    }

    max_tokens: Integer
    stop_sequences: Items[StrictStr] | None = None
    output_config: OutputConfig | None = None
    metadata: MessageMetadata | None = None

    @cached_property
    def chat(self) -> ChatRequest:
        """The same as a chat."""
        fields = {**self.same(), **self.prompt_fields(), "max_tokens": self.max_tokens}
        return chat_of({**fields, "stop": self.stop_sequences or self.stop, **_output(self.output_config)})


def _output(config: OutputConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    schema = None if config.format is None else {"name": "output", "schema": config.format.schema_}
    wanted = None if schema is None else {"type": "json_schema", "json_schema": schema}
    return {"response_format": wanted, "reasoning_effort": config.effort}


def _turn(turn: Turn) -> list[dict[str, Any]]:
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    texts = [block.text for block in turn.content if isinstance(block, TextBlock)]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}
        for block in turn.content
        if isinstance(block, ResultBlock)
    ]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in turn.content
        if isinstance(block, UseBlock)
    ]
    said: dict[str, Any] = {"role": turn.role, "content": "\n\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if texts or calls or not results else results


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _tool(tool: MessageTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _choice(choice: MessageToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    named = {"type": "function", "function": {"name": choice.name or ""}}
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    return {"tool_choice": kinds[choice.type], "parallel_tool_calls": parallel}
