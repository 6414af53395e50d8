"""What a client may want in an answer beside the text: usage in every chunk, token ids, the prompt's probabilities."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbits.engine.outputs import Delta, Logprobs
from kvbits.server.logprobs import TokenBytes, finite
from kvbits.server.protocol.base import SamplingFields
from kvbits.server.usage import Usage

_PADDED = 32
"""Characters that the text of a padded chunk seems to have, or a multiple of them."""


@dataclass(frozen=True)
class Extras:
    """The wishes of one request."""

    include_usage: bool = False
    continuous_usage: bool = False
    obfuscate: bool = False
    token_ids: bool = False
    prompt_logprobs: bool = False
    name_ids: bool = False

    @classmethod
    def of(cls, body: SamplingFields) -> Extras:
        """What ``body`` asks for."""
        stream = body.stream_options
        return cls(
            include_usage=stream is not None and stream.include_usage,
            continuous_usage=stream is not None and stream.include_usage and stream.continuous_usage_stats,
            obfuscate=stream is not None and stream.include_obfuscation,
            token_ids=bool(body.return_token_ids),
            prompt_logprobs=body.prompt_logprobs is not None,
            name_ids=bool(body.return_tokens_as_token_ids),
        )

    def reports(self, delta: Delta) -> bool:
        """Whether the log-probabilities of ``delta`` are shown.

        The token that ends an answer is not part of it, but where ids are wanted, each has its own.
        """
        return self.token_ids or not isinstance(delta.stop_reason, int)

    def chunk(self, chunk: dict[str, Any], usage: Usage, size: int) -> dict[str, Any]:
        """A chunk of a stream, of ``size`` characters of text, with what belongs into each."""
        if self.continuous_usage:
            chunk["usage"] = usage.as_json()
        elif self.include_usage:
            chunk["usage"] = None
        if self.obfuscate:
            # As long as it takes to hide how long the text is.
            chunk["obfuscation"] = secrets.token_hex(_PADDED)[: -size % _PADDED]
        return chunk

    def last(self, head: dict[str, Any], usage: Usage) -> list[dict[str, Any]]:
        """The chunks after the last choice has ended."""
        return [{**head, "choices": [], "usage": usage.as_json()}] if self.include_usage else []


def prompt_logprobs(found: Sequence[Logprobs | None] | None, name: TokenBytes) -> list[dict[str, Any] | None] | None:
    """The probabilities of a prompt's tokens, as vLLM writes them: by token id, the first without any."""
    if found is None:
        return None
    return [
        None if at is None else {
            str(token): {
                "logprob": finite(item.logprob), "rank": item.rank,
                "decoded_token": name(token).decode("utf-8", "replace"),
            }
            for token, item in at.items()
        }
        for at in found
    ]  # fmt: skip
