"""Questions about long documents, asked of one cache dtype: is the answer right, and how likely was it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import kvbits
from kvbits.codecs import Policy
from kvbits.config import AUTO
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.outputs import Delta
from kvbits.errors import RequestError
from kvbits.evaluation.compare import REFERENCE, pool_bytes
from kvbits.evaluation.forced import forced
from kvbits.evaluation.resume import ResumeCache, key_of
from kvbits.models import LoadedModel

_TOGETHER = 8
"""Questions of one document that run at once, after their common text is stored."""


@dataclass(frozen=True)
class Probe:
    """One question: ``prompt`` and the right answer ``gold`` as token ids.

    ``document`` names the text that it is about: questions of a document share their beginning, which is computed once,
    and are not independent. ``labels`` say where in a table it belongs (``length`` in tokens, ``depth`` from 0 to 1).
    """

    task: str
    document: str
    prompt: tuple[int, ...]
    gold: tuple[int, ...]
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """What a dtype made of a probe: ``logprob`` of the whole gold answer in nats, ``exact``: greedy would give it."""

    task: str
    document: str
    labels: Mapping[str, Any]
    tokens: int
    logprob: float
    exact: bool


def ask(
    loaded: LoadedModel,
    policy: Policy,
    probes: Sequence[Probe],
    resume_cache: ResumeCache,
    compute_dtype: str = "float32",
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    state_dtype: str = AUTO,
) -> list[Answered]:
    """Ask every probe, document after document, through the real engine with prefix caching.

    Documents that ``resume_cache`` knows are not run again. ``progress`` is told prompt tokens done since its last
    call. Raises ``RequestError`` when a probe does not fit the model.
    """
    engine: Engine | None = None
    found: list[Answered] = []
    for document, members in groupby(probes, key=lambda p: (p.task, p.document)):
        group = list(members)
        content = [[p.prompt, p.gold] for p in group]
        key = key_of("probes", kvbits.__version__, loaded.fingerprint, policy.name, compute_dtype, document, content)
        if key not in resume_cache:
            engine = engine or _engine(loaded, policy, probes, max_num_batched_tokens, state_dtype)
            resume_cache.put(key, _ask_document(engine, group))
        progress(sum(len(p.prompt) for p in group))
        for probe, (logprob, exact) in zip(group, resume_cache[key], strict=True):
            found.append(Answered(probe.task, probe.document, probe.labels, len(probe.gold), logprob, exact))
    return found


def _engine(
    loaded: LoadedModel, policy: Policy, probes: Sequence[Probe], max_num_batched_tokens: int, state_dtype: str
) -> Engine:
    longest = max(len(p.prompt) + len(p.gold) for p in probes)
    # Room for a second document's worth of pages: questions hold own pages beside the shared ones.
    memory = pool_bytes(loaded, policy, 2, longest, max_num_batched_tokens, state_dtype)
    config = EngineConfig(
        policy,
        memory + pool_bytes(loaded, loaded.policy(REFERENCE), 1, 64 * _TOGETHER),
        max_num_seqs=_TOGETHER,
        max_num_batched_tokens=max_num_batched_tokens,
        state_dtype=state_dtype,
    )
    return Engine(loaded, config)


def _ask_document(engine: Engine, group: Sequence[Probe]) -> list[tuple[float, bool]]:
    """Log-probability and exactness of every probe's answer."""
    vocab = engine.loaded.geometry.vocab_size
    names = [f"{index}" for index in range(len(group))]
    for name, probe in zip(names, group, strict=True):
        engine.add_request(probe.prompt, forced(probe.gold, vocab), request_id=name)
    logprobs: dict[str, float] = dict.fromkeys(names, 0.0)
    exact: dict[str, bool] = dict.fromkeys(names, True)
    for delta in _deltas(engine):
        for token, places in zip(delta.token_ids, delta.logprobs or (), strict=True):
            logprobs[delta.request_id] += places[token].logprob
            exact[delta.request_id] &= places[token].rank == 1
    return [(logprobs[name], exact[name]) for name in names]


def _deltas(engine: Engine) -> Iterator[Delta]:
    while engine.has_unfinished():
        for delta in engine.step():
            if delta.error is not None:
                raise RequestError(delta.error)
            yield delta
