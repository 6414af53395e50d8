"""``/v1/chat/completions``: the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictStr

from kvbits.server.protocol.base import Integer, Items, SamplingFields, Strict
from kvbits.server.protocol.limits import MAX_TOP_LOGPROBS


class TextPart(Strict):
    """A piece of a message's text; other kinds of parts are refused by their type."""

    type: Literal["text"]
    text: StrictStr
    prompt_cache_breakpoint: Any = None


class RefusalPart(Strict):
    """A piece of an assistant's message in which it refused."""

    type: Literal["refusal"]
    refusal: StrictStr


Content = StrictStr | Items[TextPart]


class FunctionCall(Strict):
    """What an assistant called."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(Strict):
    """A call in an assistant's earlier message."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Integer | None = None


class InstructionMessage(Strict):
    """``system`` or ``developer``."""

    role: Literal["system", "developer"]
    content: Content
    name: StrictStr | None = None


class UserMessage(Strict):
    """``user``."""

    role: Literal["user"]
    content: Content
    name: StrictStr | None = None


class AssistantMessage(Strict):
    """``assistant``. ``reasoning_content`` is an extension of many servers; it goes to the template."""

    role: Literal["assistant"]
    content: StrictStr | Items[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    refusal: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    name: StrictStr | None = None
    tool_calls: Items[ToolCall] | None = None
    annotations: Items[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """``tool``: what a call returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: StrictStr
    name: StrictStr | None = None


Message = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[StrictStr, Any] | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    """A tool; functions are the only kind here."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name in a tool choice."""

    name: StrictStr


class NamedTool(Strict):
    """A tool choice that names its function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """The schema of a response format."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    schema_: Annotated[dict[StrictStr, Any] | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class TextFormat(Strict):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingFields):
    """The body of ``/v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": (),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[Items[Message], Field(min_length=1)]
    max_completion_tokens: Integer | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[StrictStr, Any] | None = None
    split_special_tokens: StrictBool = True
