"""Who answers ``kvbits chat``: a model in this process, or one behind a URL."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from kvbits.cli.remote import Remote
from kvbits.errors import RequestError

if TYPE_CHECKING:
    from kvbits.llm import LLM

Messages = list[dict[str, str]]


@dataclass
class Turn:
    """What an answer took: tokens, how many of the prompt's came from the cache, and bytes of the whole chat."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    cache_bytes: float = 0.0
    finish: str | None = None


class Local:
    """A model in this process; ``sampling`` are the fields that were given, the model's own fill the rest."""

    def __init__(self, llm: LLM, split: bool, max_tokens: int, sampling: dict[str, Any]) -> None:
        from kvbits.engine.params import SamplingParams

        self._llm = llm
        self._split = split
        self._params = SamplingParams.of(llm.loaded.sampling_defaults, max_tokens, **sampling)

    def ask(self, messages: Messages, turn: Turn) -> Iterator[str]:
        """The answer, piece by piece; an interrupt ends it after the step that runs, and is raised then."""
        from kvbits.engine.text import encode_chat

        engine = self._llm.engine
        prompt = encode_chat(self._llm.loaded, messages, split_special_tokens=self._split)
        request_id = engine.add_request(prompt, self._params)
        try:
            with _held_interrupts() as interrupted:
                while engine.has_unfinished():
                    for delta in engine.step():
                        if delta.request_id != request_id:  # the end of one that was interrupted
                            continue
                        if delta.error is not None:
                            raise RequestError(delta.error)
                        turn.prompt_tokens, turn.cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
                        turn.new_tokens += len(delta.token_ids)
                        turn.finish = None if delta.finish_reason is None else str(delta.finish_reason)
                        yield delta.text
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            engine.abort(request_id)
            turn.cache_bytes = engine.pool.session_bytes(turn.prompt_tokens + turn.new_tokens)


@contextmanager
def _held_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of tearing a step apart; the second one does what it always does."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def hold(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


class FromServer:
    """A model behind a URL; what is not given is left to the server."""

    def __init__(self, remote: Remote, split: bool, max_tokens: int, sampling: dict[str, Any]) -> None:
        self._remote = remote
        self._model: dict[str, Any] = remote.get("/v1/models")["data"][0]
        self._fields: dict[str, Any] = {"max_tokens": max_tokens}
        self._fields |= {name: value for name, value in sampling.items() if value is not None}
        if not split:
            # Other servers do not know the field, and most take special tokens in texts for tokens anyway.
            self._fields["split_special_tokens"] = False

    def ask(self, messages: Messages, turn: Turn) -> Iterator[str]:
        """The answer, piece by piece."""
        body = {
            "model": self._model["id"],
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        for event in self._remote.events("/v1/chat/completions", body):
            for choice in event["choices"]:
                turn.finish = choice.get("finish_reason") or turn.finish
                yield choice["delta"].get("content") or ""
            usage = event.get("usage")
            if usage:
                turn.prompt_tokens, turn.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                turn.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                # Other servers do not say what a token costs them.
                per_token = self._model.get("kv_cache_bytes_per_token", 0.0)
                turn.cache_bytes = (turn.prompt_tokens + turn.new_tokens) * per_token
