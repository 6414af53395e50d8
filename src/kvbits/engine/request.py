"""One sequence that the engine works on. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvbits.engine.params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(str, enum.Enum):
    """Why a request ended; ``stop`` and ``length`` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


@dataclass(eq=False)
class Request:
    """A sequence: prompt, what was generated, and how much of it the cache holds.

    ``computed`` counts the tokens whose keys and values are stored; the newest sampled token never is. A request with
    ``n > 1`` becomes ``n`` of these, equal in ``group`` and told apart by ``index``; all but the first wait until the
    prompt is in the cache (``leader``). ``seq_id`` is its name in the page manager and counts up with arrival.
    ``deadline`` is in seconds of the engine's clock. A lower ``priority`` is served first; within one,
    ``client`` names who gets an equal share. ``suspect``: it was in a
    step that failed, and must prove itself in a step of its own. ``draft`` are tokens guessed to follow ``tokens``; the
    next step checks them.
    """

    seq_id: int
    prompt: list[int]
    params: SamplingParams
    group: str = ""
    index: int = 0
    priority: int = 0
    salt: bytes = b""
    client: str = ""
    leader: Request | None = None
    deadline: float | None = None
    status: RequestStatus = RequestStatus.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int | None = None
    preemptions: int = 0
    suspect: bool = False
    draft: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service; the smallest goes first and is preempted last."""
        return (self.priority, self.seq_id)

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that must be stored before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def ready(self) -> bool:
        """Whether it may be admitted: its leader, if any, has the prompt in the cache or is done."""
        leader = self.leader
        return leader is None or leader.finished or leader.num_output > 0

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Mark the request as ended."""
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.error = error
