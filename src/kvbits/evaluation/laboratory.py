"""Every experiment of the laboratory on several dtypes of one model, and the report's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import kvbits
from kvbits.codecs import Policy
from kvbits.codecs.states import stored_as
from kvbits.config import AUTO, PAGE_TOKENS
from kvbits.evaluation import findings
from kvbits.evaluation.arithmetic import Problem, solve
from kvbits.evaluation.bootstrap import Interval
from kvbits.evaluation.compare import REFERENCE, Comparison, SideBySide
from kvbits.evaluation.fault import FACTOR, Faulty
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.findings import Finding
from kvbits.evaluation.generation import write
from kvbits.evaluation.layers import layer_errors, measure_layers
from kvbits.evaluation.probes import Probe, ask
from kvbits.evaluation.resume import ResumeCache, key_of
from kvbits.evaluation.toolcalls import Case, call_tools
from kvbits.evaluation.verdict import Level, Measure, Verdict, dominated, judge
from kvbits.kernels import Backend, default_backend
from kvbits.models import LoadedModel

Bar = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: from a total in tokens and a label to a context that gives the function to advance it."""

Rival = tuple[str, float, Interval]
"""A dtype, its bits per element and its KL."""

FAULT = f" with scales off by {100 * (FACTOR - 1):.0f} %"
_STRETCHES = 8
"""Parts of equal length into which results by position are split."""


@dataclass
class Laboratory:
    """Runs experiments on ``policies`` and on 16 bit; :meth:`results` has what was found so far, by their labels.

    ``fidelity`` holds each dtype's comparison on text, ``figures`` what each experiment reports and ``measures`` what
    the verdict is made from. Questions, free text and tool calls run on ``served``, the same model with another
    arithmetic (``served_dtype``), where it is given. ``state_dtype``: what the ``policies``, not 16 bit, store
    recurrent states in; they are then labelled so (:func:`kvbits.evaluation.compare.with_states`). With ``faulty``
    every dtype is run with a planted fault in its codec.
    """

    loaded: LoadedModel
    policies: Sequence[Policy]
    resume_cache: ResumeCache
    bar: Bar
    compute_dtype: str = "float32"
    served: LoadedModel | None = None
    served_dtype: str = "float32"
    max_num_batched_tokens: int = 512
    state_dtype: str = AUTO
    faulty: bool = False
    fidelity: dict[str, Comparison] = field(default_factory=dict)
    kl: dict[str, Interval] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    measures: dict[str, list[Measure]] = field(default_factory=dict)

    def text(self, windows: Sequence[Sequence[int]], all_positions: bool = False) -> None:
        """Fidelity on windows of one length: of the second half; results by position also of all of it."""
        context = len(windows[0])
        first = 0 if all_positions else context // 2
        side_by_side = SideBySide(
            self.loaded, self.policies, context, self.max_num_batched_tokens, self._backend, self.state_dtype
        )
        records = {dtype: Fidelity() for dtype in self.dtypes}
        with self.bar(context * len(windows) * len(self._all), "fidelity") as advance:
            for window in windows:
                keys = {p.label: self._key("fidelity", p, first, list(window)) for p in self.policies}
                if all(key in self.resume_cache for key in keys.values()):
                    advance(context * len(self._all))
                else:
                    for dtype, record in side_by_side.run(window, first, advance).items():
                        self.resume_cache.put(keys[dtype], record.as_json())
                for dtype in self.dtypes:
                    records[dtype].extend(Fidelity.from_json(self.resume_cache[keys[dtype]]))
        for dtype in self.dtypes:
            result = self.fidelity[dtype] = side_by_side.result(dtype, records[dtype], len(windows))
            scored = result.fidelity.since(context // 2)
            self.kl[dtype], measures = findings.of_text(scored, context - 1 - context // 2)
            self.measures.setdefault(dtype, []).extend(measures)
            edges = [first + (context - first) * i // _STRETCHES for i in range(_STRETCHES + 1)]
            positions = [asdict(p) for p in result.fidelity.by_position(edges)]
            self.figures.setdefault(dtype, {})["by_position"] = positions

    def layers(self, windows: Sequence[Sequence[int]]) -> None:
        """Each layer's attention output on the same inputs."""
        parts: dict[str, list[list[list[float]]]] = {dtype: [] for dtype in self.dtypes}
        with self.bar(sum(map(len, windows)), "layers") as advance:
            for window in windows:
                keys = {p.label: self._key("layers", p, list(window)) for p in self.policies}
                if all(key in self.resume_cache for key in keys.values()):
                    advance(len(window))
                else:
                    step = self.max_num_batched_tokens
                    found = measure_layers(self.loaded, self.policies, window, step, advance, self._backend)
                    for dtype, sums in found.items():
                        self.resume_cache.put(keys[dtype], sums.as_json())
                for dtype in self.dtypes:
                    parts[dtype].append(self.resume_cache[keys[dtype]])
        for dtype in self.dtypes:
            if dtype in self._coded:
                self._add(dtype, "by_layer", findings.of_layers(layer_errors(parts[dtype])))

    def long_context(self, task: str, probes: Sequence[Probe]) -> None:
        """Questions of one task."""
        total = sum(len(p.prompt) for p in probes)
        with self.bar(total * len(self._all), task) as advance:
            answers = {
                d: ask(self._served, p, probes, self.resume_cache, *self._run_as(d, advance))
                for d, p in self._all.items()
            }
        for dtype in self.dtypes:
            figures, measures = findings.of_task(task, answers[dtype], answers[REFERENCE])
            self.figures.setdefault(dtype, {}).setdefault("tasks", {})[task] = figures
            self.measures.setdefault(dtype, []).extend(measures)

    def generation(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Free texts after ``prompts``."""
        total = 4 * sum(len(p) + new_tokens for p in prompts) * len(self._all)
        with self.bar(total, "generation") as advance:
            texts = {
                d: write(self._served, p, prompts, new_tokens, self.resume_cache, *self._run_as(d, advance))
                for d, p in self._all.items()
            }
        for dtype in self.dtypes:
            self._add(dtype, "generation", findings.of_texts(texts[dtype], texts[REFERENCE]))

    def tools(self, cases: Sequence[Case]) -> None:
        """Tool calls."""
        total = sum(len(c.prompt) for c in cases)
        with self.bar(total * len(self._all), "tools") as advance:
            calls = {
                d: call_tools(self._served, p, cases, self.resume_cache, *self._run_as(d, advance))
                for d, p in self._all.items()
            }
        for dtype in self.dtypes:
            self._add(dtype, "tools", findings.of_calls(calls[dtype], calls[REFERENCE]))

    def arithmetic(self, problems: Sequence[Problem]) -> None:
        """School arithmetic."""
        total = sum(len(p.prompt) for p in problems)
        with self.bar(total * len(self._all), "gsm8k") as advance:
            solved = {
                d: solve(self._served, p, problems, self.resume_cache, *self._run_as(d, advance))
                for d, p in self._all.items()
            }
        for dtype in self.dtypes:
            self._add(dtype, "gsm8k", findings.of_problems(solved[dtype], solved[REFERENCE]))

    def verdicts(self, beside: Sequence[Rival] = ()) -> dict[str, Verdict]:
        """The verdict on each dtype, against each other and the dtypes ``beside`` them; 16 bit competes with none."""
        found = {}
        for dtype in self.dtypes:
            better: list[str] = []
            if dtype in self.kl and dtype in self._coded:
                others = [rival for rival in (*self.rivals(), *beside) if rival[0] != dtype]
                better = dominated(self.fidelity[dtype].bits_per_element, self.kl[dtype], others)
            found[dtype] = judge(self.measures.get(dtype, ()), better)
        return found

    def rivals(self) -> list[Rival]:
        """Each dtype's bits and KL, for the verdict on others."""
        return [(d, self.fidelity[d].bits_per_element, kl) for d, kl in self.kl.items() if d in self._coded]

    def results(self, beside: Sequence[Rival] = ()) -> list[dict[str, Any]]:
        """One record a dtype, plain types."""
        verdicts = self.verdicts(beside)
        return [
            {
                **(self.fidelity[dtype].as_json() if dtype in self.fidelity else {"dtype": dtype}),
                "compute_dtype": self.compute_dtype,
                "weights": self.loaded.weights,
                **({} if self.state_dtype == AUTO else {"state_dtype": self.state_dtype}),
                **({"kl_interval": self.kl[dtype].as_json()} if dtype in self.kl else {}),
                **self.figures.get(dtype, {}),
                **verdicts[dtype].as_json(),
            }
            for dtype in self.dtypes
        ]

    @property
    def dtypes(self) -> list[str]:
        """The policies' labels."""
        return [policy.label for policy in self.policies]

    @property
    def _coded(self) -> list[str]:
        """Those that store fewer than 16 bits."""
        return [policy.label for policy in self.policies if policy.name != REFERENCE]

    @property
    def _all(self) -> dict[str, Policy]:
        """16 bit and the policies, by label."""
        return {policy.label: policy for policy in (self.loaded.policy(REFERENCE), *self.policies)}

    @property
    def _served(self) -> LoadedModel:
        return self.served or self.loaded

    def _run_as(self, dtype: str, advance: Callable[[int], None]) -> tuple[str, int, Callable[[int], None], str]:
        """The last arguments of whatever runs a dtype as served: arithmetic, budget, progress, states."""
        states = AUTO if dtype == REFERENCE else self.state_dtype
        arithmetic = self._arithmetic(self._served, self.served_dtype, states)
        return arithmetic, self.max_num_batched_tokens, advance, states

    @staticmethod
    def _arithmetic(loaded: LoadedModel, dtype: str, states: str = AUTO) -> str:
        """What finished parts are known by besides their content and the model's fingerprint."""
        return f"{dtype}, weights {loaded.weights}, on {loaded.device.type}{stored_as(states)}"

    def _backend(self) -> Backend:
        own = default_backend(str(self.loaded.device))
        return Faulty(own) if self.faulty else own

    def _key(self, kind: str, policy: Policy, *content: Any) -> str:
        step = self.max_num_batched_tokens
        return key_of(
            kind,
            kvbits.__version__,
            self.loaded.fingerprint,
            policy.name,
            self._arithmetic(self.loaded, self.compute_dtype, self.state_dtype),
            step,
            self.faulty,
            *content,
        )

    def _add(self, dtype: str, name: str, finding: Finding) -> None:
        figures, measures = finding
        self.figures.setdefault(dtype, {})[name] = figures
        self.measures.setdefault(dtype, []).extend(measures)


def plant_fault(laboratory: Laboratory, windows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Results on ``windows`` with every dtype's scales off by 5 %.

    ``noticed``: the verdict, or what it says of scales, is worse than without the fault. The laboratory must have
    measured fidelity. 16 bit has no scales and is left out.
    """
    policies = [policy for policy in laboratory.policies if policy.label in laboratory._coded]
    # One page a step: every token then reads the fault in all earlier pages.
    faulty = replace(
        laboratory, policies=policies, max_num_batched_tokens=PAGE_TOKENS, faulty=True,
        fidelity={}, kl={}, figures={}, measures={},
    )  # fmt: skip
    faulty.text(windows)
    faulty.layers(windows)
    before = laboratory.verdicts()
    verdicts = faulty.verdicts(laboratory.rivals())
    found = []
    for dtype, row in zip(faulty.dtypes, faulty.results(laboratory.rivals()), strict=True):
        worse = verdicts[dtype].level > before[dtype].level
        noticed = worse or _scales(verdicts[dtype]) > _scales(before[dtype])
        found.append({**row, "dtype": dtype + FAULT, "noticed": noticed})
    return found


def _scales(verdict: Verdict) -> Level:
    """What a verdict says of keys and values that read back too large or too small."""
    return max((m.level for m in verdict.measures if m.kind == "gain"), default=Level.NONE)
