"""What both kinds of completion take, and how a field that we cannot do is refused by its name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvbits.server.protocol.limits import MAX_SALT

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
            raise PydanticCustomError("unknown", "unknown field", {"name": unknown})
        return data


@cache
def _names(kind: type[Strict]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items()) | kind.unsupported.keys()


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: StrictBool = False


class SamplingFields(Strict):
    """Fields of ``/v1/chat/completions`` and ``/v1/completions`` alike."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    stop: StrictStr | Items[StrictStr] | None = None
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
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    cache_salt: Annotated[StrictStr, Field(max_length=MAX_SALT)] | None = None
    priority: Integer | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, harmless in cls.unsupported.items():
            if name in data:
                value = data[name]
                if value is not None and value not in harmless:
                    raise PydanticCustomError("unsupported", "the field '{name}' is not supported", {"name": name})
        return {key: value for key, value in data.items() if key not in cls.unsupported}

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "stream_options is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of its usage."""
        return self.stream_options is not None and self.stream_options.include_usage
