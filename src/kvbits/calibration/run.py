"""A whole calibration: from texts to a policy on disk that was checked through the real kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kvbits
from kvbits.calibration.collect import collect
from kvbits.calibration.fit import fit
from kvbits.calibration.goal import Goal, Sizes
from kvbits.calibration.layerwise import Layers
from kvbits.calibration.output import UNFINISHED
from kvbits.calibration.parts import Parts
from kvbits.calibration.policy import Planner, candidates, check_goal
from kvbits.calibration.sensitivity import sensitivity
from kvbits.calibration.texts import check_counts, split_windows
from kvbits.codecs import Policy
from kvbits.codecs.policy_file import save_policy
from kvbits.errors import ConfigError
from kvbits.evaluation.compare import Comparison, SideBySide, policies_of
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.laboratory import Bar
from kvbits.evaluation.resume import key_of
from kvbits.evaluation.selftext import write_windows
from kvbits.kernels import default_backend
from kvbits.models import LoadedModel

ROUNDS = 4
"""Budgets that are tried for ``max_kl``: the prediction ranks policies well and is off by a factor."""


def calibrate(
    loaded: LoadedModel,
    texts: Sequence[tuple[str, Sequence[int]]],
    output: Path,
    goal: Goal,
    sink: str | None,
    sizes: Sizes,
    bar: Bar,
    note: Callable[[str], None],
) -> tuple[Policy, Comparison]:
    """Fit a policy to ``texts`` (names and token ids; without any the model writes its own), measure it, and write it.

    ``sink`` is the dtype of every sequence's first page (``None``: as the rest). The model should compute in float32.
    ``note`` is told of every budget that is tried. Finished parts are kept in the directory :data:`UNFINISHED` of
    ``output``; the next call with the same model, texts and sizes goes on from there, whatever its goal. Raises
    ``ConfigError`` for what cannot be met, before the work where that can be known, for texts that are too short, for
    parts of another calibration and where one is at work; ``UnsupportedError`` for a model that keeps its layers in no
    list.
    """
    geometry = loaded.geometry
    policies_of(loaded, [sink or "int8"], sizes.context)
    check_goal(geometry, goal, sink)
    check_counts(sizes.context, sizes.windows, sizes.check_windows)
    Layers(loaded)
    if texts:
        split_windows([tokens for _, tokens in texts], sizes.context, sizes.windows, sizes.check_windows)
    parts = Parts(output / UNFINISHED, _run_of(loaded, texts, sizes))
    with parts.alone():
        if len(parts):
            note(f"going on with {len(parts)} finished parts in '{parts.directory}'")
        tokens = [text for _, text in texts] or _own_text(loaded, sizes, bar, parts)
        fitted, checked = split_windows(tokens, sizes.context, sizes.windows, sizes.check_windows)
        planner = planner_of(loaded, fitted, sink, bar, parts)

        def measure(budget: int) -> Comparison:
            return _measure(loaded, planner.policy(budget), checked, bar, parts)

        if goal.max_kl is not None:
            budget, found = _search(planner, measure, goal.max_kl, note)
        else:
            budget = (
                planner.of_memory(goal.memory, goal.sessions, goal.session_tokens)
                if goal.memory is not None
                else planner.of_bits(goal.bits or 0)
            )
            found = measure(budget)
        measured = {
            "texts": [name for name, _ in texts],
            "windows": sizes.windows,
            "context": sizes.context,
            "sensitivity": sensitivity(planner.table),
            "predicted_kl": planner.predicted(budget),
            "check": {k: v for k, v in found.as_json().items() if k != "dtype"},
        }
        policy = save_policy(output, planner.policy(budget), loaded.geometry, loaded.fingerprint, measured)
        parts.remove()
        return policy, found


def planner_of(
    loaded: LoadedModel, windows: Sequence[Sequence[int]], sink: str | None, bar: Bar, parts: Parts | None = None
) -> Planner:
    """What every dtype costs in every place, measured on ``windows`` (token ids), ready for any budget.

    What is in ``parts`` is not computed again.
    """
    with bar(sum(map(len, windows)), "1/3 gradients") as advance:
        statistics = collect(loaded, windows, progress=advance, parts=parts)
    with bar(len(statistics.samples), "2/3 fitting") as advance:
        table = fit(statistics, _dtypes(loaded), advance, parts)
    return Planner(loaded.geometry, table, sink)


def _dtypes(loaded: LoadedModel) -> tuple[str, ...]:
    return candidates(loaded.geometry, default_backend(str(loaded.device)))


def _run_of(loaded: LoadedModel, texts: Sequence[tuple[str, Sequence[int]]], sizes: Sizes) -> dict[str, Any]:
    """All that finished parts depend on; not the goal and the first page's dtype, which may change in between."""
    return {
        "model": f"{loaded.geometry.name} ({loaded.fingerprint})",
        "texts": {name: key_of(list(tokens)) for name, tokens in texts},
        **asdict(sizes),
        "dtypes": list(_dtypes(loaded)),
        "kvbits": kvbits.__version__,
    }


def _own_text(loaded: LoadedModel, sizes: Sizes, bar: Bar, parts: Parts) -> list[list[int]]:
    """Texts of one window each that the model writes, as many as are needed."""
    count = sizes.windows + sizes.check_windows
    part = parts.get("text")
    begun = [] if part is None else part.facts
    with bar(sizes.context * count, "writing a text") as advance:
        return write_windows(
            loaded, sizes.context, count, progress=advance, begun=begun, keep=lambda text: parts.put("text", {}, text)
        )


def _measure(
    loaded: LoadedModel, policy: Policy, windows: Sequence[Sequence[int]], bar: Bar, parts: Parts
) -> Comparison:
    """``policy`` on ``windows`` through the real kernels."""
    bits = policy.bits_per_element(loaded.geometry)
    side_by_side = SideBySide(loaded, [policy], len(windows[0]))
    record = Fidelity()
    with bar(2 * sum(map(len, windows)), f"3/3 checking {bits:.3g} bits") as advance:
        for index, window in enumerate(windows):
            name = "check-" + key_of(index, *([s.name for s in some] for some in (policy.layers, policy.sink or ())))
            part = parts.get(name)
            if part is None:
                found = side_by_side.run(window, len(window) // 2, advance)[policy.label]
                part = parts.put(name, {}, found.as_json())
            else:
                advance(2 * len(window))
            record.extend(Fidelity.from_json(part.facts))
    return side_by_side.result(policy.label, record, len(windows))


def _search(
    planner: Planner, measure: Callable[[int], Comparison], most: float, note: Callable[[str], None]
) -> tuple[int, Comparison]:
    """The fewest bits whose measured KL is at most ``most``, within a few rounds of correcting the prediction."""
    target, tried, good = most, dict[int, Comparison](), list[int]()
    for _ in range(ROUNDS):
        budget = planner.of_kl(target)
        if budget in tried:
            break
        found = tried[budget] = measure(budget)
        kl = found.summary.kl_mean
        note(f"{found.bits_per_element:.3f} bits: KL {kl:.2g}")
        good += [budget] if kl <= most else []
        if good and budget == min(good) and kl > 0.85 * most:
            break
        target = max(target * 0.95 * most / kl, planner.least_kl)
    if not good:
        nearest = min(found.summary.kl_mean for found in tried.values())
        raise ConfigError(f"a KL of {most:g} cannot be met; the nearest that was measured is {nearest:.2g}")
    return min(good), tried[min(good)]
