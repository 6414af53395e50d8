"""The answer of ``/v1/chat/completions``: chunks of a stream, or one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvbits.engine.outputs import Delta
from kvbits.server.extras import Extras, prompt_logprobs
from kvbits.server.logprobs import TokenBytes, chat_logprobs
from kvbits.server.tools import Call, CallParser
from kvbits.server.usage import Usage


@dataclass
class Piece:
    """What one delta of the engine adds to one choice."""

    text: str
    calls: list[Call]
    logprobs: list[dict[str, Any]]
    finish_reason: str | None


@dataclass
class ChatChoice:
    """One of the ``n`` answers as it grows. ``top`` is ``None`` where no log-probabilities are wanted."""

    index: int
    parser: CallParser | None
    top: int | None
    name: TokenBytes
    several: bool
    extras: Extras
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    unsent_ids: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    started: bool = False

    def push(self, delta: Delta) -> Piece:
        """Take in a delta."""
        text = delta.text
        calls: list[Call] = []
        if self.parser is not None:
            text, calls = self.parser.push(text)
            if delta.finish_reason is not None:
                rest, last = self.parser.flush(cut=delta.finish_reason == "length")
                text, calls = text + rest, calls + last
        if not self.several:
            calls = calls[: max(0, 1 - len(self.calls))]
        piece = Piece(text, calls, self._logprobs(delta), delta.finish_reason)
        self.text += text
        self.token_ids += delta.token_ids
        self.unsent_ids += delta.token_ids
        self.calls += calls
        self.logprobs += piece.logprobs
        if self.calls and piece.finish_reason == "stop":
            piece.finish_reason = "tool_calls"
        self.finish_reason = piece.finish_reason
        return piece

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        silent = self.calls or (self.parser is not None and self.parser.forced)
        message: dict[str, Any] = {"role": "assistant", "content": (self.text or None) if silent else self.text}
        message["refusal"] = None
        if self.calls:
            message["tool_calls"] = [call.as_json() for call in self.calls]
        return message

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        if self.top is None or delta.logprobs is None or not self.extras.reports(delta):
            return []
        return chat_logprobs(delta.token_ids, delta.logprobs, self.top, self.name, self.extras.name_ids)


class ChatAnswer:
    """All choices of one request; ``head`` is what every object begins with, ``echoed`` what the request said.

    ``before``: text of the request that an answer begins with.
    """

    def __init__(
        self,
        head: dict[str, Any],
        choices: list[ChatChoice],
        prompt: list[int],
        extras: Extras = Extras(),  # noqa: B008
        echoed: dict[str, Any] | None = None,
        before: str = "",
    ) -> None:
        self._head = head
        self._choices = choices
        self._prompt = prompt
        self._extras = extras
        self._echoed = echoed or {}
        self._before = before
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None
        self.usage = Usage([len(prompt)])

    def push(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """Take in a delta of the only prompt; returns the chunks of a stream that it makes."""
        choice = self._choices[delta.index]
        chunks = []
        if not choice.started:
            choice.started = True
            first = self._chunk(choice, {"role": "assistant", "content": ""}, ids=False)
            chunks.append({**first, "prompt_token_ids": self._prompt} if self._extras.token_ids else first)
            if self._before:
                choice.text = self._before
                chunks.append(self._chunk(choice, {"content": self._before}, ids=False))
        self.usage.add(prompt, delta)
        if self._extras.prompt_logprobs and delta.index == 0 and delta.prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(delta.prompt_logprobs, choice.name)
        piece = choice.push(delta)
        parts: list[dict[str, Any]] = [{"content": piece.text}] if piece.text or piece.logprobs else []
        for number, call in enumerate(piece.calls, start=len(choice.calls) - len(piece.calls)):
            parts.append({"tool_calls": [call.as_json(number)]})
        # The end comes with the last words, so that every chunk of a stream has something new. Clients end a call only
        # at a chunk behind it.
        if piece.finish_reason is not None and (piece.calls or not parts):
            parts.append({})
        for part in parts:
            logprobs = piece.logprobs or None if "content" in part else None
            ended = piece.finish_reason if part is parts[-1] else None
            chunks.append(self._chunk(choice, part, logprobs, ended))
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """The chunks after the last choice has ended."""
        return self._extras.last({**self._head, "object": "chat.completion.chunk"}, self.usage)

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [self._whole(choice) for choice in self._choices]
        found: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.usage.as_json(),
            "prompt_token_ids": self._prompt if self._extras.token_ids else None,
            "prompt_logprobs": self._prompt_logprobs,
        }
        return found | self._echoed

    @property
    def choices(self) -> list[ChatChoice]:
        """The choices so far."""
        return self._choices

    @property
    def finish_reasons(self) -> list[str | None]:
        return [choice.finish_reason for choice in self._choices]

    def _whole(self, choice: ChatChoice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": choice.message(),
            "logprobs": None if choice.top is None else {"content": choice.logprobs, "refusal": None},
            "finish_reason": choice.finish_reason,
            "token_ids": choice.token_ids if self._extras.token_ids else None,
        }

    def _chunk(
        self,
        choice: ChatChoice,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
        ids: bool = True,
    ) -> dict[str, Any]:
        found = {
            "index": choice.index,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": finish_reason,
        }
        if self._extras.token_ids and ids:
            # What showed no text of its own goes with the next piece that does.
            found["token_ids"], choice.unsent_ids = choice.unsent_ids, []
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [found]}
        return self._extras.chunk(chunk, self.usage, len(str(delta.get("content", ""))))
