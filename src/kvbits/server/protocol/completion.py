"""``/v1/completions``, ``/tokenize`` and ``/detokenize``: the requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, StrictBool, StrictInt, StrictStr

from kvbits.server.protocol.base import SamplingFields, Strict, TokenIds
from kvbits.server.protocol.chat import Message, ResponseFormat, Tool
from kvbits.server.protocol.limits import MAX_LOGPROBS


class CompletionRequest(SamplingFields):
    """The body of ``/v1/completions``; a prompt is text or token ids, and there may be a list of them."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: StrictStr | TokenIds | list[StrictStr] | list[TokenIds]
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: StrictInt | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: StrictBool = True

    def prompts(self) -> list[str | list[int]]:
        """All prompts, one after another."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class TokenizeRequest(Strict):
    """The body of ``/tokenize``: a prompt, or a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    split_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False


class DetokenizeRequest(Strict):
    """The body of ``/detokenize``."""

    model: StrictStr | None = None
    tokens: TokenIds
