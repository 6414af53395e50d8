"""What both kinds of completion take, and how a field that we cannot do is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from kvbits.server.protocol.limits import MAX_SALT

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenIds = list[StrictInt]


class Strict(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: StrictBool = False


class SamplingFields(Strict):
    """Fields of ``/v1/chat/completions`` and ``/v1/completions`` alike.

    ``unsupported`` names the fields that OpenAI documents and this server cannot do, with the values that ask for
    nothing and are therefore fine.
    """

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    seed: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    max_tokens: StrictInt | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[StrictStr, Number] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: StrictBool | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    cache_salt: Annotated[StrictStr, Field(max_length=MAX_SALT)] | None = None
    priority: StrictInt | None = None

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
