"""A request on its way: its random state, its text, and when it is done. No torch."""

from __future__ import annotations

import logging

from kvbits.engine.detokenize import Detokenizer, TokenDecoder
from kvbits.engine.outputs import Delta, Logprobs
from kvbits.engine.request import FinishReason, Request
from kvbits.engine.sampling import SamplingState
from kvbits.engine.stops import StopStrings

log = logging.getLogger(__name__)


class RequestState:
    """Wraps one :class:`Request` with all that a sampled token touches."""

    def __init__(self, request: Request, decode: TokenDecoder, ends: frozenset[int], max_model_len: int) -> None:
        params = request.params
        self.request = request
        self._ends = frozenset() if params.ignore_eos else ends
        self.sampling = SamplingState(params, request.index, request.prompt, self._ends)
        self.prompt_logprobs: list[Logprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self._limit = max_model_len
        if params.max_tokens is not None:
            self._limit = min(self._limit, len(request.prompt) + params.max_tokens)
        self._context = max_model_len
        self._detokenizer = Detokenizer(decode, request.prompt)
        self._stops = StopStrings(params.stops, params.include_stop_str_in_output)

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._limit - len(self.request.tokens)

    def accept(self, token: int, logprobs: Logprobs | None) -> Delta:
        """Append a sampled token; the delta has a finish reason if it was the last."""
        request = self.request
        request.tokens.append(token)
        request.suspect = False
        self.sampling.observe(token)
        reason: FinishReason | None = None
        stop: int | str | None = None
        text = ""
        if token in self._ends or token in request.params.stop_tokens:
            reason, stop = FinishReason.STOP, token
        else:
            text, stop = self._text(token)
            if stop is not None or self.sampling.complete:
                reason = FinishReason.STOP
            elif len(request.tokens) >= self._limit:
                reason = FinishReason.LENGTH
                if self._limit == self._context:
                    request.note = f"the context of {self._context} tokens is full"
        if reason is not None and not isinstance(stop, str):
            rest, found = self._rest()
            text += rest
            if found is not None:
                reason, stop = FinishReason.STOP, found
        if reason is not None:
            request.stop_reason = stop
            request.finish(reason)
        return self._delta(text, (token,), None if logprobs is None else (logprobs,))

    def finish(self, reason: FinishReason, error: str | None = None) -> Delta:
        """End the request from outside; the delta carries the text that was still held back, if it can be had."""
        self.request.finish(reason, error)
        try:
            text = self._rest()[0]
        # The request may end because its tokens have no text.
        except Exception:
            log.exception("the last text of a request was lost")
            text = ""
        return self._delta(text)

    def _text(self, token: int) -> tuple[str, str | None]:
        """What ``token`` shows, and the stop string that it completes. One that begins too early is text."""
        text = self._detokenizer.push(token)
        if self.request.num_output < self.request.params.min_tokens:
            return text, None
        return self._stops.push(text)

    def _rest(self) -> tuple[str, str | None]:
        text, found = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush(), found

    def _delta(self, text: str, tokens: tuple[int, ...] = (), logprobs: tuple[Logprobs, ...] | None = None) -> Delta:
        request = self.request
        first = request.num_output == len(tokens) and self.prompt_logprobs is not None
        return Delta(
            request_id=request.group,
            index=request.index,
            token_ids=tokens,
            text=text,
            logprobs=logprobs,
            finish_reason=None if request.finish_reason is None else request.finish_reason.value,
            stop_reason=request.stop_reason,
            error=request.error,
            note=request.note,
            num_prompt_tokens=len(request.prompt),
            num_cached_tokens=request.cached or 0,
            prompt_logprobs=tuple(self.prompt_logprobs or ()) if first else None,
        )
