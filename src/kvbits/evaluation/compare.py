"""Cache dtypes against the 16-bit cache on the same text, through the real pool and kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvbits.codecs import PoolLayout
from kvbits.codecs.artifact import resolve_policy
from kvbits.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.errors import ConfigError
from kvbits.evaluation.fidelity import Fidelity, FidelitySummary
from kvbits.kernels import Backend, default_backend
from kvbits.models import LoadedModel

REFERENCE = "bf16"
"""The dtype that everything is compared with."""


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
    dtypes: Sequence[str],
    windows: Sequence[Sequence[int]],
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    backend: Callable[[], Backend] = default_backend,
) -> list[Comparison]:
    """Run every window (token ids, all of one length) through each dtype and through 16 bit; score the second half.

    The row at position ``p`` predicts token ``p + 1``; rows ``context / 2`` to ``context - 2`` are scored, as
    llama.cpp's perplexity tool does. ``progress`` is told the tokens computed since its last call. Raises
    ``ConfigError`` for a policy that cannot be read and ``UnsupportedError`` for one that does not fit the model.
    """
    context = len(windows[0])
    side_by_side = SideBySide(loaded, dtypes, context, max_num_batched_tokens, backend)
    records = {dtype: Fidelity() for dtype in dtypes}
    for window in windows:
        for dtype, record in side_by_side.run(window, context // 2, progress).items():
            records[dtype].extend(record)
    return [side_by_side.result(dtype, records[dtype], len(windows)) for dtype in dtypes]


class SideBySide:
    """Engines of several dtypes and of 16 bit that read the same window together.

    The caches advance chunk by chunk, so that the logits of one chunk are all that is held.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        dtypes: Sequence[str],
        context: int,
        max_num_batched_tokens: int = 512,
        backend: Callable[[], Backend] = default_backend,
    ) -> None:
        """Windows will have ``context`` tokens; ``backend`` makes each engine's kernels."""
        self.context = context
        self._dtypes = tuple(dtypes)
        self._engines = {
            d: _engine(loaded, d, context, max_num_batched_tokens, backend()) for d in (REFERENCE, *dtypes)
        }

    def run(
        self, window: Sequence[int], first: int, progress: Callable[[int], None] = lambda tokens: None
    ) -> dict[str, Fidelity]:
        """Each dtype's record of the positions ``first`` to ``context - 2`` of one window."""
        tokens = torch.tensor(window)
        records = {dtype: Fidelity() for dtype in self._dtypes}
        runs = {dtype: engine.teacher_forced(window, first) for dtype, engine in self._engines.items()}
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


def check_dtypes(loaded: LoadedModel, dtypes: Sequence[str], context: int) -> None:
    """Raise ``ConfigError`` or ``UnsupportedError`` now for what :func:`compare` would stumble over later."""
    for dtype in dtypes:
        PoolLayout.of(loaded.geometry, resolve_policy(dtype, loaded.geometry, loaded.fingerprint))
    if context > loaded.geometry.max_position:
        raise ConfigError(
            f"a context of {context} tokens is over the {loaded.geometry.max_position} tokens of {loaded.name}"
        )


def policy_name(loaded: LoadedModel, dtype: str) -> str:
    """A name that stands for the bytes of ``dtype``: that of a calibrated policy identifies its calibration."""
    return resolve_policy(dtype, loaded.geometry, loaded.fingerprint).name


def pool_bytes(loaded: LoadedModel, dtype: str, sequences: int, tokens: int) -> int:
    """Bytes of a pool in which ``sequences`` running sequences of ``tokens`` tokens fit, one frame in 50 to spare."""
    layout = PoolLayout.of(loaded.geometry, resolve_policy(dtype, loaded.geometry, loaded.fingerprint))
    frames = (sequences + 1) * layout.open.frames + sequences * layout.frames_of(tokens)
    return (frames + frames // 50 + 1) * layout.frame_bytes


def _engine(loaded: LoadedModel, dtype: str, context: int, max_num_batched_tokens: int, backend: Backend) -> Engine:
    memory = pool_bytes(loaded, dtype, 1, context)
    config = EngineConfig(dtype, memory, max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=False)
    return Engine(loaded, config, backend)
