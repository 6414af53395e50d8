"""What the bodies of ``/v1/responses`` and ``/v1/messages`` share: they are read, and become chats."""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator, StrictBool, StrictStr, ValidationError
from pydantic_core import PydanticCustomError

from kvbits.server.errors import invalid
from kvbits.server.protocol.base import Integer, Number, Stop, Strict
from kvbits.server.protocol.chat import ChatRequest


def known_types(*names: str) -> BeforeValidator:
    """Refuses an object of a type that is none of ``names``, by its type."""

    def check(data: Any) -> Any:
        kind = data.get("type", names[0]) if isinstance(data, dict) else names[0]
        if isinstance(kind, str) and kind not in names:
            raise PydanticCustomError("unsupported", "'{kind}' is not supported here", {"kind": kind[:40]})
        return data

    return BeforeValidator(check)


class ChatLike(Strict):
    """Fields of a request that becomes a chat under the same names."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    seed: Integer | None = None
    stop: Stop | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    ignore_eos: StrictBool | None = None
    chat_template_kwargs: dict[StrictStr, Any] | None = None
    cache_salt: StrictStr | None = None
    priority: Integer | None = None

    @property
    def n(self) -> int:
        """Such a request gets one answer."""
        return 1

    def same(self) -> dict[str, Any]:
        """These fields for a chat."""
        return {name: getattr(self, name) for name in ChatLike.model_fields if getattr(self, name) is not None}


def chat_of(fields: dict[str, Any]) -> ChatRequest:
    """A chat of ``fields``. Raises ``ApiError`` for one that is none."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise invalid(error, given) from None
