"""The answer of ``/v1/responses``: events of a stream, or one object."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.server.chat_answer import ChatChoice
from kvbits.server.protocol.responses import ResponsesRequest
from kvbits.server.tools import Call
from kvbits.server.usage import Usage


@dataclass
class _Open:
    """The message that is being written: its place among the items, its text and probabilities."""

    place: int
    id: str
    text: str
    logprobs: list[dict[str, Any]]

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}


class ResponsesAnswer:
    """One answer; ``choice`` finds text and calls in it."""

    def __init__(
        self,
        response_id: str,
        model: str,
        body: ResponsesRequest,
        choice: ChatChoice,
        prompt: int,
        params: SamplingParams,
    ) -> None:
        self._id = response_id
        self._model = model
        self._body = body
        self._choice = choice
        self._params = params
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._number = 0
        self.usage = Usage([prompt])

    def push(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """Take in a delta; returns the events of a stream that it makes."""
        self.usage.add(prompt, delta)
        events = [] if self._number else self._begin()
        piece = self._choice.push(delta)
        if piece.text or piece.logprobs:
            events += self._say(piece.text, piece.logprobs)
        for call in piece.calls:
            events += self._close("completed") + self._call(call)
        if piece.finish_reason is not None:
            cut = piece.finish_reason == "length"
            if not self._items and self._open is None and not cut:
                events += self._say("", [])
            events += self._close("incomplete" if cut else "completed")
            events.append(self._event("incomplete" if cut else "completed", response=self.whole()))
        return events

    def last(self) -> list[dict[str, Any]]:
        """Nothing comes after the last event."""
        return []

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        reason = self._choice.finish_reason
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        return self._object(status, self.usage if reason is not None else None)

    @property
    def finish_reasons(self) -> list[str | None]:
        return [self._choice.finish_reason]

    def _begin(self) -> list[dict[str, Any]]:
        return [self._event(name, response=self._object("in_progress", None)) for name in ("created", "in_progress")]

    def _say(self, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        events = []
        if self._open is None:
            self._open = _Open(len(self._items), f"msg_{uuid.uuid4().hex}", "", [])
            events += [
                self._item_event("added", self._open.place, self._open.item("in_progress")),
                self._part_event("content_part.added", part={**self._open.part(), "logprobs": []}),
            ]
        self._open.text += text
        self._open.logprobs += logprobs
        return [*events, self._part_event("output_text.delta", delta=text, logprobs=logprobs)]

    def _close(self, status: str) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        done, item = self._open, self._open.item(status)
        events = [
            self._part_event("output_text.done", text=done.text, logprobs=done.logprobs),
            self._part_event("content_part.done", part=done.part()),
            self._item_event("done", done.place, item),
        ]
        self._items.append(item)
        self._open = None
        return events

    def _call(self, call: Call) -> list[dict[str, Any]]:
        place, name = len(self._items), f"fc_{uuid.uuid4().hex}"
        whole = self._choice.finish_reason != "length"
        head = {"id": name, "type": "function_call", "call_id": call.id, "name": call.name}
        item = {**head, "arguments": call.arguments, "status": "completed" if whole else "incomplete"}
        self._items.append(item)
        where = {"item_id": name, "output_index": place}
        return [
            self._item_event("added", place, {**head, "arguments": "", "status": "in_progress"}),
            self._event("function_call_arguments.delta", **where, delta=call.arguments),
            self._event("function_call_arguments.done", **where, name=call.name, arguments=call.arguments),
            self._item_event("done", place, item),
        ]

    def _item_event(self, name: str, place: int, item: dict[str, Any]) -> dict[str, Any]:
        return self._event(f"output_item.{name}", output_index=place, item=item)

    def _part_event(self, name: str, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        where = {"item_id": self._open.id, "output_index": self._open.place, "content_index": 0}
        return self._event(name, **where, **fields)

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def _object(self, status: str, usage: Usage | None) -> dict[str, Any]:
        body = self._body
        wanted = body.text.format if body.text is not None else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            # Nothing is kept, whatever was asked for.
            "store": False,
            "temperature": self._params.temperature,
            "text": {"format": {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)},
            "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
            "tools": [_plain(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump()


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
