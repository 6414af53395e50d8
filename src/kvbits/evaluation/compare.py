"""Cache dtypes against the 16-bit cache on the same text, through the real pool and kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kvbits.codecs import Policy, PoolLayout
from kvbits.codecs.states import StateLayout, stored_as
from kvbits.config import AUTO
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine, MakeRunner
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.errors import ConfigError
from kvbits.evaluation.fidelity import Fidelity, FidelitySummary
from kvbits.kernels import Backend
from kvbits.models import LoadedModel

REFERENCE = "bf16"
"""The dtype that everything is compared with."""

MakeBackend = Callable[[], Backend | None]


@dataclass(frozen=True)
class Comparison:
    """One dtype's result; ``fidelity`` keeps every scored position, ``summary`` is of each window's second half."""

    dtype: str
    bits_per_element: float
    effective_bits_per_element: float
    windows: int
    context: int
    fidelity: Fidelity

    @property
    def summary(self) -> FidelitySummary:
        """Means over the second half of each window."""
        return self.fidelity.since(self.context // 2).summary()

    def as_json(self) -> dict[str, Any]:
        """The result under the names of the command line's JSON."""
        return {
            "dtype": self.dtype,
            **asdict(self.summary),
            "bits_per_element": self.bits_per_element,
            "effective_bits_per_element": self.effective_bits_per_element,
            "windows": self.windows,
            "context": self.context,
        }


def compare(
    loaded: LoadedModel,
    policies: Sequence[Policy],
    windows: Sequence[Sequence[int]],
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    backend: MakeBackend = lambda: None,
) -> list[Comparison]:
    """Run every window (token ids, all of one length) through each policy and through 16 bit; score the second half.

    The row at position ``p`` predicts token ``p + 1``; rows ``context / 2`` to ``context - 2`` are scored, as
    llama.cpp's perplexity tool does. ``progress`` is told the tokens computed since its last call. Raises
    ``UnsupportedError`` for a policy that does not fit the model.
    """
    context = len(windows[0])
    side_by_side = SideBySide(loaded, policies, context, max_num_batched_tokens, backend)
    records = {policy.label: Fidelity() for policy in policies}
    for window in windows:
        for dtype, record in side_by_side.run(window, context // 2, progress).items():
            records[dtype].extend(record)
    return [side_by_side.result(policy.label, records[policy.label], len(windows)) for policy in policies]


class SideBySide:
    """Engines of several policies and of 16 bit that read the same window together.

    The caches advance chunk by chunk, so that the logits of one chunk are all that is held. Results are by label.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        policies: Sequence[Policy],
        context: int,
        max_num_batched_tokens: int = 512,
        backend: MakeBackend = lambda: None,
        state_dtype: str = AUTO,
    ) -> None:
        """Windows will have ``context`` tokens; ``backend`` makes each engine's kernels (``None``: its device's).

        With a ``state_dtype`` the ``policies`` (:func:`with_states`), not 16 bit, store recurrent states in it, and
        what is scored is read token by token: a state is rounded where a step ends.
        """
        self.context = context
        self._dtypes = tuple(policy.label for policy in policies)
        self._singly = state_dtype != AUTO
        self._engines = {
            policy.label: engine_for(
                loaded, policy, 1, context, max_num_batched_tokens, backend(),
                state_dtype=AUTO if policy.label == REFERENCE else state_dtype,
            )
            for policy in (loaded.policy(REFERENCE), *policies)
        }  # fmt: skip

    def run(
        self, window: Sequence[int], first: int, progress: Callable[[int], None] = lambda tokens: None
    ) -> dict[str, Fidelity]:
        """Each dtype's record of the positions ``first`` to ``context - 2`` of one window."""
        tokens = torch.tensor(window)
        records = {dtype: Fidelity() for dtype in self._dtypes}
        runs = {d: engine.teacher_forced(window, first, self._singly) for d, engine in self._engines.items()}
        computed = 0
        for start, reference in runs[REFERENCE]:
            # the last row's target lies outside the window
            rows = min(len(reference), self.context - 1 - start)
            seen = start + len(reference) - computed
            computed += seen
            progress(seen)
            for dtype in self._dtypes:
                place, logits = (start, reference) if dtype == REFERENCE else next(runs[dtype])
                assert (place, logits.shape) == (start, reference.shape), (dtype, place, start)
                if dtype != REFERENCE:
                    progress(seen)
                targets = tokens[start + 1 : start + 1 + rows]
                records[dtype].add(reference[:rows], logits[:rows], targets, start)
        for run in runs.values():
            assert next(run, None) is None, "a cache has rows that the 16-bit cache has not"
        return records

    def result(self, dtype: str, record: Fidelity, windows: int) -> Comparison:
        """What was found of ``dtype`` in ``windows`` windows, with the bits that it takes."""
        pool = self._engines[dtype].pool
        return Comparison(
            dtype=dtype,
            bits_per_element=pool.bits_per_element(),
            effective_bits_per_element=pool.effective_bits_per_element(self.context),
            windows=windows,
            context=self.context,
            fidelity=record,
        )


def policies_of(loaded: LoadedModel, dtypes: Sequence[str], context: int) -> list[Policy]:
    """Read ``dtypes``.

    Raises ``ConfigError`` or ``UnsupportedError`` now for what :func:`compare` would stumble over later.
    """
    policies = [loaded.policy(dtype) for dtype in dtypes]
    for policy in policies:
        policy.check(loaded.geometry)
    if context > loaded.geometry.max_position:
        raise ConfigError(
            f"a context of {context} tokens is over the {loaded.geometry.max_position} tokens of {loaded.name}"
        )
    return policies


def with_states(loaded: LoadedModel, policies: Sequence[Policy], state_dtype: str) -> list[Policy]:
    """``policies`` under labels that say what recurrent states are stored in, where that is not ``auto``.

    Raises ``ConfigError`` for a model without such states.
    """
    loaded.geometry.stored_in(state_dtype)
    return [replace(policy, label=policy.label + stored_as(state_dtype)) for policy in policies]


def pool_bytes(
    loaded: LoadedModel,
    policy: Policy,
    sequences: int,
    tokens: int,
    max_num_batched_tokens: int = 512,
    state_dtype: str = AUTO,
) -> int:
    """Bytes of a cache for ``sequences`` of ``tokens`` tokens (:meth:`kvbits.codecs.PoolLayout.pool_bytes`), states of
    recurrent layers included."""
    layout = PoolLayout.of(loaded.geometry, policy, free_windows=loaded.device.type == "cpu")
    states = StateLayout.of(loaded.geometry.stored_in(state_dtype), loaded.compute_dtype.itemsize)
    beside = 0 if states is None else states.memory_for(sequences)
    return layout.pool_bytes(sequences, tokens, max_num_batched_tokens) + beside


def engine_for(
    loaded: LoadedModel,
    policy: Policy,
    sequences: int,
    tokens: int,
    max_num_batched_tokens: int = 512,
    backend: Backend | None = None,
    speculative: SpeculativeConfig | None = None,
    runner: MakeRunner = ModelRunner,
    state_dtype: str = AUTO,
) -> Engine:
    """An engine without prefix caching whose pool is made to measure for ``sequences`` of ``tokens`` tokens."""
    config = EngineConfig(
        policy,
        pool_bytes(loaded, policy, sequences, tokens, max_num_batched_tokens, state_dtype),
        max_num_seqs=sequences,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,
        state_dtype=state_dtype,
    )
    return Engine(loaded, config, backend, speculative, runner)
