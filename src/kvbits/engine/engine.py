"""The engine: requests in, tokens and text out, one step at a time.

A step is: draft (where tokens are guessed), schedule, model, sample, commit; on a GPU the next step is planned before
the tokens are there. One thread drives it. A request that fails ends with an error of its own, whichever part of a step
it fails in; when a whole step fails, its requests are tried again one by one, so that only the guilty one ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from kvbits.codecs.groups import kinds_of
from kvbits.engine.ahead import Ahead
from kvbits.engine.answer import Answer, answer
from kvbits.engine.batch import Piece, StepBatch, build
from kvbits.engine.config import EngineConfig
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.engine.request import FinishReason, Request
from kvbits.engine.request_state import RequestState
from kvbits.engine.scheduler import ScheduledRequest, Scheduler, SchedulerOutput
from kvbits.engine.setup import (
    check_heads,
    check_invariance,
    context_of,
    limits_of,
    pages_of,
    policy_of,
    recurrent_line,
    states_of,
)
from kvbits.engine.speculation import SpeculativeConfig, Speculator
from kvbits.engine.speculation.methods import proposer_of
from kvbits.engine.stats import EngineLoad, EngineStats
from kvbits.engine.text import Decoders, encode_plain, end_tokens
from kvbits.errors import RequestError
from kvbits.kernels import Backend, choose_backend, kernels_line
from kvbits.models import LoadedModel
from kvbits.pages import PageManager
from kvbits.pool import PagedPool

log = logging.getLogger(__name__)

MakeRunner = Callable[[LoadedModel, PagedPool, PageManager, Backend], ModelRunner]


class Engine:
    """Serves many requests at once from one quantized pool.

    ``backend``: kernels, by name (:data:`kvbits.kernels.BACKENDS`) or ready-made; ``None`` goes by the model's device.
    ``speculative``: tokens are guessed ahead and checked several at a time. ``runner`` makes what runs a step (another
    one watches or fills pages, for measurements). Raises ``ConfigError`` for options that
    contradict the model or the pool, ``UnsupportedError`` where the kernels cannot store a layer as the policy asks.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig | None = None,
        backend: Backend | str | None = None,
        speculative: SpeculativeConfig | None = None,
        runner: MakeRunner = ModelRunner,
    ) -> None:
        self.loaded = loaded
        self.config = config = config or EngineConfig()
        self.backend = choose_backend(backend, str(loaded.device))
        check_heads(loaded, config)
        check_invariance(loaded, config, self.backend)
        self.max_model_len = context_of(loaded, config)
        policy = policy_of(loaded, config, self.backend)
        self.kernels = kernels_line(self.backend, policy.layers, loaded.geometry.layers)
        log.info("Kernels that decode: %s", self.kernels)
        states = states_of(loaded, config)
        self.pool = PagedPool(
            loaded.geometry,
            policy,
            config.kv_cache_memory - (0 if states is None else states.num_bytes),
            device=loaded.device,
            free_windows=self.backend.layer_groups,
            states=states,
        )
        if not self.backend.layer_groups and set(kinds_of(loaded.geometry)) != {None}:
            log.warning("The backend '%s' keeps pages that have left a sliding window.", self.backend.name)
        self.recurrent = recurrent_line(states)
        if self.recurrent:
            log.info("Beside attention: %s", self.recurrent)
        self.backend.prepare(self.pool.layers)
        self.pages = pages_of(self.pool, loaded, config)
        self.limits = limits_of(self.pool, self.max_model_len, config)
        seats = config.max_num_seqs if states is None else min(config.max_num_seqs, states.num_slots)
        self.scheduler = Scheduler(self.pages, self.limits.pool, seats, config.max_num_batched_tokens)
        self.stats = EngineStats()
        self._runner = runner(loaded, self.pool, self.pages, self.backend)
        self.speculator: Speculator | None = None
        if speculative is not None:
            proposer = proposer_of(speculative, loaded, config, self._runner, self.pages)
            self.speculator = Speculator(proposer, speculative, self.stats.speculation)
            self.stats.seconds["draft"] = 0.0
        self._ahead = Ahead(self.scheduler) if loaded.device.type != "cpu" and speculative is None else None
        self._decoders = Decoders(loaded)
        self._ends = end_tokens(loaded)
        self._groups: dict[str, list[RequestState]] = {}
        self._states: dict[int, RequestState] = {}
        self._pending: list[Delta] = []
        self._next = 0
        if loaded.device.type != "cpu":
            self.warm_up(log.info)

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compile and record now what requests would wait for; ``report`` gets a line of text before each stage."""
        chunk = self.config.max_num_batched_tokens
        tokens = max(min(chunk, self.limits.context, self.limits.pool), 1)
        self._runner.warm_up(self._new_seq_id(), tokens, chunk, self.config.max_num_seqs, report)

    # Requests

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
        client: str = "",
        timeout: float | None = None,
    ) -> str:
        """Queue a prompt of token ids; returns the request's id.

        ``salt`` separates prefix caches; clients of different names get equal shares; ``timeout`` is in seconds from
        now. Raises ``RequestError`` when the request can never be served.
        """
        params = params or SamplingParams()
        request_id = f"request-{self._next}" if request_id is None else request_id
        if request_id in self._groups:
            raise RequestError(f"a request with the id '{request_id}' is already running")
        self.limits.check_prompt(prompt, room=1)
        self.limits.check_params(params)
        params.find_bans(lambda text: encode_plain(self.loaded, text))
        decode = self._decoders.showing(params.skip_special_tokens, params.visible_tokens)
        deadline = None if timeout is None else time.monotonic() + timeout
        group: list[RequestState] = []
        shared, salted = list(prompt), salt.encode()
        for index in range(params.n):
            request = Request(
                self._new_seq_id(),
                shared,
                params,
                group=request_id,
                index=index,
                priority=priority,
                salt=salted,
                client=client,
                leader=group[0].request if group else None,
                deadline=deadline,
            )
            group.append(RequestState(request, decode, self._ends, self.max_model_len))
        # All of them, or none.
        for state in group:
            self._states[state.request.seq_id] = state
            self.scheduler.add(state.request)
        self._groups[request_id] = group
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request; its pages are free at once. Its last delta comes from the next step. Unknown ids are fine."""
        for state in list(self._groups.get(request_id, ())):
            self._pending.append(self._end(state, FinishReason.ABORT))

    def has_unfinished(self) -> bool:
        """Whether :meth:`step` has anything left to do or to say."""
        return bool(self._states or self._pending)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether any sequence of a request is still to end."""
        return request_id in self._groups

    def load(self) -> EngineLoad:
        """Sequences and frames at this moment."""
        scheduler = self.scheduler
        return EngineLoad(
            len(scheduler.running),
            len(scheduler.waiting),
            self.pool.num_frames,
            self.pages.available(),
            scheduler.shares.counts(),
        )

    # Steps

    def step(self) -> list[Delta]:
        """Advance every running request; returns what is new."""
        deltas, self._pending = self._pending, []
        deltas += self._expire()
        if self.speculator is not None:
            with self.stats.timed("draft"):
                self.speculator.propose(self.scheduler.decoding(), self._states)
        begin = time.perf_counter()
        with self.stats.timed("schedule"):
            plan, batch = self._schedule(deltas)
        deltas += self._settle(plan)
        if not plan.works:
            return deltas
        self.stats.steps += 1
        with self.stats.timed("model"):
            logits, error = self._forward(plan.works, batch)
        if logits is None:
            return deltas + self._recover(plan.works, error)
        early = self._look_ahead(plan.works)
        with self.stats.timed("sample"):
            try:
                answers = answer(plan.works, logits, self._states)
            except Exception as caught:
                log.exception("no token could be chosen in a step of %d requests", len(plan.works))
                return deltas + self._recover(plan.works, f"{type(caught).__name__}: {caught}")
        with self.stats.timed("commit"):
            for work, found in zip(plan.works, answers, strict=True):
                found.error = found.error or early.get(work.request.seq_id)
                deltas += self._commit(work, found)
        if self.speculator is not None:
            self.speculator.observe(plan.works, time.perf_counter() - begin)
        return deltas

    def teacher_forced(self, tokens: Sequence[int], first: int, singly: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Logits for given tokens, through the real pool and kernels.

        Yields ``(position, logits)``, float32 ``[rows, vocab]`` of positions ``position``, ``position + 1`` and so on,
        chunk after chunk, for every position from ``first`` on; with ``singly`` these are steps of one token, as an
        answer's, between which recurrent states are stored. Nothing is taken from the prefix cache, and no request can
        find what this stores. Raises ``RequestError`` when the tokens fit neither the model's context nor the pool
        or the logits are not finite, ``OutOfPages`` when running requests leave too little of the pool.
        """
        self.limits.check_prompt(tokens, room=0)
        if not 0 <= first < len(tokens):
            raise RequestError(f"first is {first}; it must be a position of the {len(tokens)} tokens")
        chunk = self.config.max_num_batched_tokens
        return self._runner.teacher_forced(self._new_seq_id(), tokens, first, chunk, singly)

    # Internals

    def _new_seq_id(self) -> int:
        self._next += 1
        return self._next - 1

    def _end(self, state: RequestState, reason: FinishReason, error: str | None = None) -> Delta:
        delta = state.finish(reason, error)
        self._forget(state)
        return delta

    def _forget(self, state: RequestState) -> None:
        """Free the pages of a sequence that ends."""
        request = state.request
        reason = str(request.finish_reason)
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        self.scheduler.remove(request)
        if self.speculator is not None:
            self.speculator.forget(request)
        del self._states[request.seq_id]
        group = self._groups[request.group]
        group.remove(state)
        if not group:
            del self._groups[request.group]

    def _expire(self) -> list[Delta]:
        late = [v for v in self._states.values() if v.request.deadline is not None]
        if not late:
            return []
        now = time.monotonic()
        message = "the request's deadline has passed"
        return [
            self._end(v, FinishReason.ABORT, message)
            for v in late
            if v.request.deadline is not None and v.request.deadline <= now
        ]

    def _schedule(self, deltas: list[Delta]) -> tuple[SchedulerOutput, StepBatch | None]:
        """The next step's plan, an empty one where planning fails, and its arrays where they were made ahead. A request
        that cannot be planned alone ends."""
        suspect = self.scheduler.suspect()
        try:
            ready = None if self._ahead is None else self._ahead.take()
            return (self.scheduler.schedule(), None) if ready is None else (SchedulerOutput(ready[0]), ready[1])
        except Exception as error:
            log.exception("a step could not be planned")
            # Wherever the plan broke off, some may stand in no queue, and some may hold pages for rows that never come.
            for state in list(self._states.values()):
                self.scheduler.requeue(state.request)
                state.request.suspect = state.request.suspect or suspect is None
            if suspect is not None:
                message = f"no step could be planned for this request: {type(error).__name__}: {error}"
                deltas.append(self._end(self._states[suspect.seq_id], FinishReason.ERROR, message))
            return SchedulerOutput(), None

    def _look_ahead(self, works: Sequence[ScheduledRequest]) -> dict[int, str]:
        """While the device works: record what the step stores, and plan the next one. What failed, by sequence."""
        if self._ahead is None:
            return {}
        with self.stats.timed("commit"):
            errors = {work.request.seq_id: self._store(work, work.start + work.count) for work in works}
        failed = {seq_id: error for seq_id, error in errors.items() if error is not None}
        if not failed:
            with self.stats.timed("schedule"):
                self._ahead.make()
        return failed

    def _settle(self, plan: SchedulerOutput) -> list[Delta]:
        """Account for what the scheduler decided besides the work itself."""
        self.stats.preemptions += len(plan.preempted)
        deltas = []
        for request in plan.exhausted:
            request.note = f"the KV cache of {self.config.kv_cache_memory} bytes is full"
            deltas.append(self._end(self._states[request.seq_id], FinishReason.LENGTH))
        return deltas

    def _forward(self, works: Sequence[ScheduledRequest], batch: StepBatch | None) -> tuple[Tensor | None, str]:
        """Logits of the step, whose arrays ``batch`` may be there, or ``None`` and what went wrong."""
        try:
            if batch is None:
                pieces = [Piece(w.request.seq_id, w.start, w.tokens, w.outputs) for w in works]
                batch = build(pieces, self.pages)
            return self._runner.run(batch), ""
        # Whatever the model raises must not take down the requests beside the one that caused it.
        except Exception as error:
            log.exception("a step of %d requests failed", len(works))
            return None, f"{type(error).__name__}: {error}"

    def _recover(self, works: Sequence[ScheduledRequest], error: str) -> list[Delta]:
        """After a failed step: its only request ends; of several, each is tried again alone."""
        if len(works) == 1:
            message = f"the model failed on this request: {error}"
            return [self._end(self._states[works[0].request.seq_id], FinishReason.ERROR, message)]
        for work in works:
            work.request.suspect = True
            self.scheduler.requeue(work.request)
        return []

    def _commit(self, work: ScheduledRequest, found: Answer) -> list[Delta]:
        """Record what the step stored and keeps, and the tokens that it brought."""
        request = work.request
        state = self._states[request.seq_id]
        end = work.start + work.count + found.accepted
        if request.computed < end:
            error = self._store(work, end)
            found.error = found.error or error
        self.stats.computed_tokens += end - work.start
        if work.draft and self.speculator is not None:
            self.speculator.verified(work, found.accepted)
        if work.samples and request.num_output == len(found.deltas):
            self.stats.prompt_tokens += len(request.prompt)
            self.stats.cached_tokens += request.cached or 0
        self.stats.generated_tokens += len(found.deltas)
        if request.finished:
            self._forget(state)
        elif found.error is not None:
            return [*found.deltas, self._end(state, FinishReason.ERROR, found.error)]
        return found.deltas

    def _store(self, work: ScheduledRequest, end: int) -> str | None:
        """Record that the cache holds a request's tokens up to ``end``; what went wrong."""
        request = work.request
        request.computed = end
        try:
            self.pages.commit(request.seq_id, request.tokens[work.start : end])
        except Exception as error:
            log.exception("what a step stored could not be recorded")
            return f"{type(error).__name__}: {error}"
        return None
