"""The answer of ``/v1/messages``: events of a stream, or one object."""

from __future__ import annotations

import json
from typing import Any

from kvbits.engine.outputs import Delta
from kvbits.server.chat_answer import ChatChoice
from kvbits.server.tools import Call
from kvbits.server.usage import Usage

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessagesAnswer:
    """One answer; ``choice`` finds text and calls in it."""

    def __init__(self, message_id: str, model: str, choice: ChatChoice, prompt: int) -> None:
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._choice = choice
        self._blocks: list[dict[str, Any]] = []
        self._started = False
        self._stop: str | None = None
        self.usage = Usage([prompt])

    def push(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """Take in a delta; returns the events of a stream that it makes."""
        self.usage.add(prompt, delta)
        events: list[dict[str, Any]] = []
        if not self._started:
            self._started = True
            usage = {**self._usage(), "output_tokens": 0}
            events.append({"type": "message_start", "message": {**self._object(None), "usage": usage}})
        piece = self._choice.push(delta)
        if piece.text:
            events += self._say(piece.text)
        for call in piece.calls:
            events += self._close() + self._call(call)
        if piece.finish_reason is not None:
            self._stop = delta.stop_reason if isinstance(delta.stop_reason, str) else None
            events += self._close()
            ended = {"stop_reason": self._reason, "stop_sequence": self._stop}
            events.append({"type": "message_delta", "delta": ended, "usage": self._usage()})
            events.append({"type": "message_stop"})
        return events

    def last(self) -> list[dict[str, Any]]:
        """Nothing comes after the last event."""
        return []

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        return self._object(self._reason)

    @property
    def finish_reasons(self) -> list[str | None]:
        return [self._choice.finish_reason]

    @property
    def _reason(self) -> str | None:
        if self._stop is not None:
            return "stop_sequence"
        reason = self._choice.finish_reason
        return None if reason is None else _REASONS.get(reason, "end_turn")

    @property
    def _writing(self) -> bool:
        return bool(self._blocks) and self._blocks[-1].get("open", False)

    def _say(self, text: str) -> list[dict[str, Any]]:
        events = []
        if not self._writing:
            self._blocks.append({"type": "text", "text": "", "open": True})
            events.append(self._event("start", content_block={"type": "text", "text": ""}))
        self._blocks[-1]["text"] += text
        return [*events, self._event("delta", delta={"type": "text_delta", "text": text})]

    def _close(self) -> list[dict[str, Any]]:
        if not self._writing:
            return []
        del self._blocks[-1]["open"]
        return [self._event("stop")]

    def _call(self, call: Call) -> list[dict[str, Any]]:
        head = {"type": "tool_use", "id": call.id, "name": call.name}
        self._blocks.append({**head, "input": _object(call.arguments)})
        return [
            self._event("start", content_block={**head, "input": {}}),
            self._event("delta", delta={"type": "input_json_delta", "partial_json": call.arguments}),
            self._event("stop"),
        ]

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"content_block_{name}", "index": len(self._blocks) - 1, **fields}

    def _object(self, reason: str | None) -> dict[str, Any]:
        content = [{key: value for key, value in block.items() if key != "open"} for block in self._blocks]
        ended = {"stop_reason": reason, "stop_sequence": self._stop}
        return {**self._head, "content": content, **ended, "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        cached = self.usage.cached_tokens
        return {
            "input_tokens": self.usage.prompt_tokens - cached,
            "output_tokens": self.usage.completion_tokens,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }


def _object(arguments: str) -> Any:
    """Arguments as an object; those of a call that was cut off are none."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
