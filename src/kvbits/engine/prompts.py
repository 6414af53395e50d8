"""What :class:`kvbits.LLM` takes as prompts and messages: looked at before anything runs, refused by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbits.engine.params import SamplingParams
from kvbits.errors import ConfigError, RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or vLLM's dictionary: ``prompt`` or ``prompt_token_ids``, and ``cache_salt`` if wanted."""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True)
class Given:
    """One prompt: its text or its token ids, and what separates its prefix cache."""

    text: str | None
    token_ids: list[int]
    salt: str = ""


def read_prompts(prompts: Any) -> list[Given]:
    """One prompt or many. Raises ``RequestError`` for what is none, naming its place."""
    if isinstance(prompts, str | Mapping):
        return [_read(prompts, "the prompt")]
    items = _items(prompts, "the prompts", "text, token ids, a dictionary, or a list of these")
    if items and all(_is_id(item) for item in items):
        return [_read(items, "the prompt")]
    return [_read(item, f"prompt {place}") for place, item in enumerate(items)]


def read_prompt(prompt: Any) -> Given:
    """One prompt. Raises ``RequestError`` for what is none, or several."""
    return _read(prompt, "the prompt")


def read_params(params: Any, count: int) -> list[SamplingParams]:
    """Sampling parameters for each of ``count`` prompts. Raises ``ConfigError`` for anything else."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    found = list(params) if isinstance(params, Sequence) and not isinstance(params, str | bytes) else [params]
    wrong = next((item for item in found if not isinstance(item, SamplingParams)), None)
    if wrong is not None or not isinstance(params, Sequence):
        kind = type(params if wrong is None else wrong).__name__
        raise ConfigError(f"sampling_params must be SamplingParams or a list of them, not {kind}")
    if len(found) != count:
        raise ConfigError(f"there are {len(found)} sampling parameters for {count} prompts; give one, or one for each")
    return found


def read_chats(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation or many, each message with its text in one piece. Raises ``RequestError`` for what is none."""
    items = _items(messages, "the messages", "a list of messages, or a list of such lists")
    return [read_chat(chat) for chat in ([items] if items and isinstance(items[0], Mapping) else items)]


def read_chat(messages: Any) -> list[dict[str, Any]]:
    """One conversation, as :func:`read_chats` reads many."""
    return [_message(message, place) for place, message in enumerate(_items(messages, "a chat", "a list of messages"))]


def _read(prompt: Any, where: str) -> Given:
    if isinstance(prompt, str):
        return Given(prompt, [])
    if isinstance(prompt, Mapping):
        return _read_dictionary(prompt, where)
    ids = _items(prompt, where, "text, token ids or a dictionary")
    wrong = next((item for item in ids if not _is_id(item)), None)
    if wrong is not None:
        raise RequestError(f"{where} holds {wrong!r:.80}; token ids are integers")
    return Given(None, [operator.index(item) for item in ids])


def _read_dictionary(prompt: Mapping[str, Any], where: str) -> Given:
    unknown = next((key for key, value in prompt.items() if key not in _KEYS and value is not None), None)
    if unknown is not None:
        raise RequestError(f"{where} has the key {unknown!r:.80}; a dictionary may have {', '.join(_KEYS)}")
    text, ids, salt = (prompt.get(key) for key in _KEYS)
    if salt is not None and not isinstance(salt, str):
        raise RequestError(f"cache_salt of {where} is {salt!r:.80}; it must be text")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' of {where} is {text!r:.80}; it must be text")
    if ids is None and text is None:
        raise RequestError(f"{where} has neither 'prompt' nor 'prompt_token_ids'")
    # Of both the ids count, and the text is what it is called.
    found = Given(text, []) if ids is None else _read(_items(ids, where, "token ids"), where)
    return Given(text, found.token_ids, salt or "")


def _message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"message {place} is {message!r:.80}; a message is a mapping with 'role' and 'content'")
    content = message.get("content")
    if content is None and message["role"] != "assistant":
        raise RequestError(f"message {place} of the role '{message['role']}' has no 'content'")
    return {**message, "content": _text(content, place)}


def _text(content: Any, place: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(_items(content, f"content of message {place}", "text or a list of parts")):
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"part {number} of message {place} is of type {kind!r:.80}; only text can be read")
        texts.append(text)
    return "".join(texts)


def _items(value: Any, where: str, wanted: str) -> list[Any]:
    # Arrays and tensors are no sequences, yet lists of ids all the same.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise RequestError(f"{where} must be {wanted}, not {type(value).__name__}")
    return list(value)


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
