"""Which traces, loads and machine to simulate, and every dtype's outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbits.codecs import PoolLayout
from kvbits.config import WATERMARK, parse_bytes
from kvbits.errors import ConfigError
from kvbits.planning.facts import ModelFacts
from kvbits.planning.outcome import SimulationResult
from kvbits.planning.request import SEQUENCES, Options, Planned
from kvbits.planning.simulate import EngineLimits, simulate
from kvbits.planning.timing import Machine, StepTime
from kvbits.traces import Arrival, read_trace


@dataclass(frozen=True)
class Run:
    """One dtype at one load."""

    dtype: str
    load: float
    outcome: SimulationResult

    def as_json(self) -> dict[str, Any]:
        """Plain types; see :meth:`SimulationResult.as_json`."""
        return {"dtype": self.dtype, "load": self.load, **self.outcome.as_json()}


@dataclass(frozen=True)
class Traffic:
    """A trace at several loads (1: as recorded) on devices of a kind."""

    name: str
    arrivals: Sequence[Arrival]
    loads: tuple[float, ...]
    machine: Machine

    @classmethod
    def read(cls, path: Path, first: int | None, loads: tuple[float, ...], bandwidth: str, tflops: float) -> Traffic:
        """Read ``path``, its ``first`` requests or all. Raises ``ConfigError`` for what makes no sense."""
        for load in loads:
            if not 0 < load < float("inf"):
                raise ConfigError(f"the load is {load:g}; it must be positive")
        if tflops <= 0:
            raise ConfigError(f"the operations a second are {tflops:g} * 10^12; they must be positive")
        if first is not None and first < 1:
            raise ConfigError(f"the first {first} requests of a trace were asked for; at least one is needed")
        arrivals = read_trace(path)
        return cls(path.name, arrivals[:first], loads, Machine(parse_bytes(bandwidth), tflops * 1e12))

    def as_json(self) -> dict[str, Any]:
        """What the runs have in common."""
        return {
            "name": self.name,
            "requests": len(self.arrivals),
            "bandwidth": self.machine.bandwidth,
            "flops": self.machine.flops,
            "prompt_tokens": sum(a.prompt for a in self.arrivals),
            "answer_tokens": sum(a.answer for a in self.arrivals),
        }

    def run(
        self,
        facts: ModelFacts,
        planned: Planned,
        options: Options,
        progress: Callable[[int], None] = lambda requests: None,
    ) -> Iterator[Run]:
        """Every dtype at every load. ``progress`` is told of requests that ended."""
        made, geometry = planned.plan, planned.geometry
        limits = EngineLimits(
            options.max_num_seqs or SEQUENCES, options.max_num_batched_tokens, options.watermark or WATERMARK
        )
        for policy, scheme in zip(planned.policies, made.schemes, strict=True):
            step = StepTime.of(
                self.machine, facts, geometry, made.weights_bytes, scheme.kv_bytes_per_token, options.ranks
            )
            for load in self.loads:
                layout = PoolLayout.of(geometry, policy)
                longest = scheme.longest_context
                outcome = simulate(self.arrivals, layout, scheme.num_frames, longest, step, limits, load, progress)
                yield Run(scheme.dtype, load, outcome)
