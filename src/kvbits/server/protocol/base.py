"""What both kinds of completion take, and how a field that we cannot do is refused by its name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvbits.server.protocol.limits import MAX_METADATA, MAX_METADATA_TEXT, MAX_SALT, MAX_TOP_LOGPROBS

log = logging.getLogger(__name__)

T = TypeVar("T")


def _numbers(data: Any) -> Any:
    for key, value in data.items() if isinstance(data, dict) else ():
        # Not isfinite, which makes a float of an integer, and some are too large.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise PydanticCustomError("number", "the value of {key} must be a finite number", {"key": repr(key[:40])})
    return data


# Of a list or an object with a million mistakes only the first is looked at: making the errors is the slow part.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Items = Annotated[list[T], Field(fail_fast=True)]
Numbers = Annotated[dict[StrictStr, Number], BeforeValidator(_numbers)]
# What no integer of ours exceeds; one of thousands of digits is neither computed with nor written into a message.
Integer = Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)]
TokenIds = Items[Integer]


def _text_or_list(data: Any) -> str | None:
    return "<text>" if isinstance(data, str) else "<list>" if isinstance(data, list) else None


# Told apart by what they are, so that a mistake in a list is not called a missing string.
TextOrList = Discriminator(
    _text_or_list, custom_error_type="text_or_list", custom_error_message="must be a string or a list"
)
Text = Annotated[StrictStr, Tag("<text>")]
Stop = Annotated[Text | Annotated[Items[StrictStr], Tag("<list>")], TextOrList]


def _few_pairs(data: Any) -> Any:
    texts = [text for pair in data.items() for text in pair] if isinstance(data, dict) else []
    if len(texts) > 2 * MAX_METADATA or any(not isinstance(t, str) or len(t) > MAX_METADATA_TEXT for t in texts):
        words = f"holds at most {MAX_METADATA} pairs of texts of {MAX_METADATA_TEXT} characters"
        raise PydanticCustomError("too_many", words)
    return data


Metadata = Annotated[dict[StrictStr, StrictStr], BeforeValidator(_few_pairs)]


class Strict(BaseModel):
    """A JSON object without unknown fields.

    ``unsupported`` names the fields that OpenAI documents and this server cannot do, with the values that ask for
    nothing and are therefore fine. ``most_values``: numbers, strings, lists and objects that such a body may hold.
    """

    model_config = ConfigDict(extra="forbid")
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    most_values: ClassVar[int] = 1 << 17

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, data: Any) -> Any:
        names = _names(cls)
        if isinstance(data, dict) and not data.keys() <= names:
            unknown = next(name for name in data if name not in names)
            raise PydanticCustomError("unknown", "unknown field", {"at": unknown})
        return _without_unsupported(cls, data)


class Lenient(Strict):
    """A JSON object inside a conversation: clients add fields of their own, which are ignored."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, data: Any) -> Any:
        if log.isEnabledFor(logging.DEBUG) and isinstance(data, dict) and not data.keys() <= _names(cls):
            unknown = sorted(str(name)[:40] for name in data.keys() - _names(cls))[:8]
            log.debug("fields of a conversation are ignored", extra={"facts": {"of": cls.__name__, "names": unknown}})
        return data


def _without_unsupported(cls: type[Strict], data: Any) -> Any:
    if not isinstance(data, dict) or not cls.unsupported.keys() & data.keys():
        return data
    for name, harmless in cls.unsupported.items():
        value = data.get(name)
        if value is not None and value not in harmless:
            raise PydanticCustomError("unsupported", "the field '{at}' is not supported", {"at": name})
    return {key: value for key, value in data.items() if key not in cls.unsupported}


@cache
def _names(kind: type[Strict]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items()) | kind.unsupported.keys()


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: StrictBool = False


TextOrObject = Annotated[
    Text | Annotated[dict[StrictStr, Any], Tag("<object>")],
    Discriminator(lambda data: "<text>" if isinstance(data, str) else "<object>"),
]


class StructuredOutputs(Strict):
    """``structured_outputs``: one thing that the answer must be."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,), "disable_any_whitespace": (False,), "disable_fallback": (False,),
        "structural_tag": (), "whitespace_pattern": (),
    }  # fmt: skip

    # A schema, or one written as text.
    json_: TextOrObject | None = Field(None, alias="json")
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Annotated[Items[StrictStr], Field(min_length=1)] | None = None
    grammar: StrictStr | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise PydanticCustomError("one_of", "must have one of json, json_object, regex, choice and grammar")
        return self


class SamplingFields(Strict):
    """Fields of ``/v1/chat/completions`` and ``/v1/completions`` alike."""

    # vLLM's and SGLang's, as their clients send them when they ask for nothing.
    nothing: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "detokenize": (True,), "kv_transfer_params": ({},), "length_penalty": (1,), "logits_processors": ([],),
        "lora_path": (), "no_stop_trim": (False,), "request_id": (), "spaces_between_special_tokens": (True,),
        "thinking_token_budget": (), "use_beam_search": (False,), "vllm_xargs": ({},),
    }  # fmt: skip

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    stop: Stop | None = None
    seed: Integer | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    max_tokens: Integer | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Numbers | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Integer | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    bad_words: Items[StrictStr] | None = None
    allowed_token_ids: TokenIds | None = None
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    logprob_token_ids: TokenIds | None = None
    prompt_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    structured_outputs: StructuredOutputs | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    cache_salt: Annotated[StrictStr, Field(max_length=MAX_SALT)] | None = None
    priority: Integer | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "needs_stream", "stream_options is only allowed when stream is true", {"at": "stream_options"}
            )
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError(
                "no_stream", "prompt_logprobs is only allowed when stream is false", {"at": "prompt_logprobs"}
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of its usage."""
        return self.stream_options is not None and self.stream_options.include_usage
