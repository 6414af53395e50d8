"""How long requests took: the histograms that need every delta, filled in the engine's thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram

from kvbits.engine.outputs import Delta

_LATENCY = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_RECENT = 512


@dataclass
class _Timing:
    arrived: float
    left: int
    first: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    generated: int = 0


class Observer:
    """Times every request. One thread writes; ``recent_*`` may be read by any."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(f"vllm:{name}", text, ("model_name",), registry=registry, buckets=buckets)
            return found.labels(model)

        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.", _LATENCY)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _BETWEEN)
        self._queue = histogram("request_queue_time_seconds", "Arrival to the first step that works on it.", _WHOLE)
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to the end of the answer.", _WHOLE)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens of an answer, all choices.", _TOKENS)
        self._finished = Counter(
            "vllm:request_success", "Sequences by finish reason.", ("model_name", "finished_reason"), registry=registry
        )
        self._model = model
        self._timings: dict[str, _Timing] = {}
        self._queued: dict[str, float] = {}
        self.recent_first: deque[float] = deque(maxlen=_RECENT)
        self.recent_between: deque[float] = deque(maxlen=_RECENT)

    def arrived(self, request_id: str, n: int, when: float) -> None:
        """A request of ``n`` sequences was taken; it came at ``when`` of the monotonic clock."""
        self._timings[request_id] = _Timing(when, n)
        self._queued[request_id] = when

    def gone(self, request_id: str) -> None:
        """Nobody waits for this request any more."""
        self._queued.pop(request_id, None)
        if self._timings.pop(request_id, None) is not None:
            self._finished.labels(self._model, "abort").inc()

    def admitted(self, request_ids: Iterable[str], begin: float) -> None:
        """These run since the step that began at ``begin``, or an earlier one."""
        if not self._queued:
            return
        for request_id in request_ids:
            arrived = self._queued.pop(request_id, None)
            if arrived is not None:
                self._queue.observe(max(0.0, begin - arrived))

    def step(self, deltas: Sequence[Delta], begin: float) -> None:
        """Account for what the step brought that began at ``begin``."""
        # Those that came and ended in this one step do not run any more.
        self.admitted((d.request_id for d in deltas if d.token_ids), begin)
        now = time.monotonic()
        for delta in deltas:
            timing = self._timings.get(delta.request_id)
            if timing is not None:
                self._account(timing, delta, now)

    def _account(self, timing: _Timing, delta: Delta, now: float) -> None:
        if delta.token_ids:
            timing.generated += len(delta.token_ids)
            if timing.first is None:
                timing.first = now
                self._first.observe(now - timing.arrived)
                self._prompt.observe(delta.num_prompt_tokens)
                self.recent_first.append(now - timing.arrived)
            before = timing.last.get(delta.index)
            # Tokens that one step brings together, as guesses do, have no time between them.
            if before is not None and now > before:
                self._between.observe(now - before)
                self.recent_between.append(now - before)
            timing.last[delta.index] = now
        if delta.finish_reason is not None:
            self._finished.labels(self._model, delta.finish_reason).inc()
            timing.left -= 1
            if timing.left == 0:
                self._whole.observe(now - timing.arrived)
                self._generated.observe(timing.generated)
                del self._timings[delta.request_id]
                self._queued.pop(delta.request_id, None)
