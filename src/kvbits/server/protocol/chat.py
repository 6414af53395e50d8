"""``/v1/chat/completions``: the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, StrictBool, StrictStr, Tag, model_validator
from pydantic_core import PydanticCustomError

from kvbits.server.protocol.base import (
    Integer,
    Items,
    Lenient,
    Metadata,
    SamplingFields,
    Strict,
    Text,
    TextOrList,
)
from kvbits.server.protocol.limits import MAX_TOP_LOGPROBS


class TextPart(Lenient):
    """A piece of a message's text."""

    type: Literal["text"]
    text: StrictStr


class RefusalPart(Lenient):
    """A piece of an assistant's message in which it refused."""

    type: Literal["refusal"]
    refusal: StrictStr


def _known_part(data: Any) -> Any:
    kind = data.get("type") if isinstance(data, dict) else "text"
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        words = "parts of type '{kind}' are not supported; this server reads text"
        raise PydanticCustomError("unsupported", words, {"kind": kind[:40]})
    return data


Part = Annotated[TextPart, BeforeValidator(_known_part)]
AnswerPart = Annotated[Annotated[TextPart | RefusalPart, Field(discriminator="type")], BeforeValidator(_known_part)]
Content = Annotated[Text | Annotated[Items[Part], Tag("<list>")], TextOrList]
AnswerContent = Annotated[Text | Annotated[Items[AnswerPart], Tag("<list>")], TextOrList]


class FunctionCall(Lenient):
    """What an assistant called."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(Lenient):
    """A call in an assistant's earlier message."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Integer | None = None


class InstructionMessage(Lenient):
    """``system`` or ``developer``."""

    role: Literal["system", "developer"]
    content: Content
    name: StrictStr | None = None


class UserMessage(Lenient):
    """``user``."""

    role: Literal["user"]
    content: Content
    name: StrictStr | None = None


class AssistantMessage(Lenient):
    """``assistant``. ``reasoning_content``, or ``reasoning``, is an extension of many servers, for the template."""

    role: Literal["assistant"]
    content: AnswerContent | None = None
    refusal: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: Any = None
    name: StrictStr | None = None
    tool_calls: Items[ToolCall] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Lenient):
    """``tool``: what a call returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: StrictStr
    name: StrictStr | None = None


def _known_role(data: Any) -> Any:
    if isinstance(data, dict) and data.get("role") not in ("system", "developer", "user", "assistant", "tool"):
        words = "must be system, developer, user, assistant or tool"
        raise PydanticCustomError("role", words, {"at": "role"})
    return data


Message = Annotated[
    Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")],
    BeforeValidator(_known_role),
]


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


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<object>")],
    Discriminator(lambda data: "<text>" if isinstance(data, str) else "<object>"),
]


class ChatFields(Strict):
    """What a chat is made of, in an answer and in ``/tokenize`` alike."""

    chat_template_kwargs: dict[StrictStr, Any] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    split_special_tokens: StrictBool = True

    @model_validator(mode="after")
    def _one_end(self) -> ChatFields:
        if self.continue_final_message and self.add_generation_prompt:
            words = "continue_final_message needs add_generation_prompt to be false"
            raise PydanticCustomError("one_end", words, {"at": "continue_final_message"})
        return self


class ChatRequest(ChatFields, SamplingFields):
    """The body of ``/v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingFields.nothing,
        "add_special_tokens": (False,),
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "chat_template_content_format": ("auto", "string"),
        "documents": ([],),
        "function_call": ("none",),
        "functions": (),
        "include_reasoning": (True,),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "separate_reasoning": (True,),
        "service_tier": ("auto", "default"),
        "stream_reasoning": (True,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[Items[Message], Field(min_length=1)]
    max_completion_tokens: Integer | None = None
    echo: StrictBool | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Annotated[StrictStr, Field(max_length=32)] | None = None
    metadata: Metadata | None = None
    store: StrictBool | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            words = "max_tokens and max_completion_tokens differ; give one of them"
            raise PydanticCustomError("one_limit", words, {"at": "max_tokens"})
        if self.top_logprobs is not None and not self.logprobs:
            words = "top_logprobs is only allowed when logprobs is true"
            raise PydanticCustomError("needs_logprobs", words, {"at": "top_logprobs"})
        if self.logprob_token_ids and not self.logprobs:
            words = "logprob_token_ids is only allowed when logprobs is true"
            raise PydanticCustomError("needs_logprobs", words, {"at": "logprob_token_ids"})
        return self
