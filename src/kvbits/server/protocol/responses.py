"""``/v1/responses``: the request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag

from kvbits.server.protocol.base import Integer, Items, Lenient, Metadata, Strict, Text, TextOrList
from kvbits.server.protocol.chat import ChatRequest, Function
from kvbits.server.protocol.items import ChatLike, chat_of, known_types
from kvbits.server.protocol.limits import MAX_TOP_LOGPROBS


class TextItem(Lenient):
    """A piece of a message's text."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: StrictStr | None = None
    refusal: StrictStr | None = None


Parts = Items[Annotated[TextItem, known_types("input_text", "output_text", "text", "refusal")]]
Content = Annotated[Text | Annotated[Parts, Tag("<list>")], TextOrList]


class MessageItem(Lenient):
    """A message of any role."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(Lenient):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr


class ResultItem(Lenient):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Content


class ReasoningItem(Lenient):
    """What a model thought; models here get none of it back."""

    type: Literal["reasoning"]


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(data: Any) -> str | None:
    return f"<{data.get('type', 'message')}>" if isinstance(data, dict) else None


Item = Annotated[
    Annotated[
        Annotated[MessageItem, Tag("<message>")]
        | Annotated[CallItem, Tag("<function_call>")]
        | Annotated[ResultItem, Tag("<function_call_output>")]
        | Annotated[ReasoningItem, Tag("<reasoning>")],
        Discriminator(_kind, custom_error_type="item", custom_error_message="must be an item of a conversation"),
    ],
    known_types(*_ITEMS),
]


class ResponseTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class NamedResponseTool(Strict):
    """A tool choice that names its function."""

    type: Literal["function"]
    name: StrictStr


class TextFormat(Strict):
    """Plain text, any JSON object, or JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Annotated[dict[StrictStr, Any] | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class TextOptions(Strict):
    """``text``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class Reasoning(Strict):
    """``reasoning``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"generate_summary": (), "summary": ("auto",)}

    effort: StrictStr | None = None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedResponseTool, Tag("<object>")],
    Discriminator(lambda data: "<text>" if isinstance(data, str) else "<object>"),
]


class ResponsesRequest(ChatLike):
    """The body of ``/v1/responses``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": (),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }

    input: Annotated[Text | Annotated[Items[Item], Tag("<list>")], TextOrList]
    instructions: StrictStr | None = None
    max_output_tokens: Integer | None = None
    tools: Items[Annotated[ResponseTool, known_types("function")]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Items[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Metadata | None = None
    store: StrictBool | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None

    @cached_property
    def chat(self) -> ChatRequest:
        """The same as a chat."""
        logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        return chat_of(
            {
                **self.same(),
                "messages": self._messages(),
                "max_completion_tokens": self.max_output_tokens,
                "tools": None if self.tools is None else [_tool(tool) for tool in self.tools],
                "tool_choice": _choice(self.tool_choice),
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": None if self.text is None else _format(self.text.format),
                "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
                "logprobs": logprobs or None,
                "top_logprobs": self.top_logprobs if logprobs else None,
            }
        )

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        for item in [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            if isinstance(item, MessageItem):
                found.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, CallItem):
                # Calls of one turn, and what was said before them, are one message of a chat.
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                calls = found[-1].setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            elif isinstance(item, ResultItem):
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return found


def _text(content: str | list[TextItem]) -> str:
    return content if isinstance(content, str) else "".join(part.text or part.refusal or "" for part in content)


def _tool(tool: ResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _choice(choice: str | NamedResponseTool | None) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedResponseTool) else choice


def _format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else {"type": wanted.type}
    schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": {k: v for k, v in schema.items() if v is not None}}
