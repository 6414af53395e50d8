"""``/v1/completions``, ``/tokenize`` and ``/detokenize``: the requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import BeforeValidator, Discriminator, Field, StrictBool, StrictStr, Tag
from pydantic_core import PydanticCustomError

from kvbits.server.protocol.base import Integer, Items, SamplingFields, Strict, Text, TokenIds
from kvbits.server.protocol.chat import ChatFields, Message, ResponseFormat, Tool
from kvbits.server.protocol.limits import MAX_LOGPROBS, MAX_PROMPTS

_MOST_IDS = 1 << 19
"""Values of a body whose prompts may be token ids."""


def _few(data: Any) -> Any:
    if isinstance(data, list) and len(data) > MAX_PROMPTS and not isinstance(data[0], int):
        count = {"count": len(data), "most": MAX_PROMPTS}
        raise PydanticCustomError("too_many", "prompt holds {count} prompts; 1 to {most} are possible", count)
    return data


def _prompt_kind(data: Any) -> str | None:
    if isinstance(data, list):
        first = data[0] if data else 0
        return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"
    return "<text>" if isinstance(data, str) else None


Prompt = Annotated[
    Text
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[Items[StrictStr], Tag("<texts>")]
    | Annotated[Items[TokenIds], Tag("<lists>")],
    Discriminator(
        _prompt_kind, custom_error_type="prompt", custom_error_message="must be a text, token ids, or a list of either"
    ),
]


class CompletionRequest(SamplingFields):
    """The body of ``/v1/completions``; a prompt is text or token ids, and there may be a list of them."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SamplingFields.nothing, "suffix": ("",)}
    most_values: ClassVar[int] = _MOST_IDS

    prompt: Annotated[Prompt, BeforeValidator(_few)]
    echo: StrictBool | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Integer | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: StrictBool = True

    def prompts(self) -> list[str | list[int]]:
        """All prompts, one after another."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        # All parts are of one kind, and there may be very many.
        if not self.prompt or isinstance(self.prompt[0], int):
            return [cast("list[int]", self.prompt)]
        return cast("list[str | list[int]]", self.prompt)


class TokenizeRequest(ChatFields):
    """The body of ``/tokenize``: a prompt, or a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Items[Message] | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False


class DetokenizeRequest(Strict):
    """The body of ``/detokenize``."""

    most_values: ClassVar[int] = _MOST_IDS

    model: StrictStr | None = None
    tokens: TokenIds
