"""The laboratory's pictures: each from the results of several dtypes, none where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kvbits.planning.colours import colour_of

Results = Sequence[Mapping[str, Any]]

_LEAST_KL = 1e-6


def bits_and_kl(results: Results) -> Figure | None:
    """KL to 16 bit over the bits that it is bought with, with intervals."""
    shown = [r for r in results if r.get("kl_mean", 0) > 0]
    if not shown:
        return None
    figure, axes = _figure(6.4, 3.8)
    for r in shown:
        low, high = (abs(r["kl_mean"] - r["kl_interval"][end]) for end in ("low", "high"))
        bits = r["bits_per_element"]
        axes.errorbar(
            [bits], [r["kl_mean"]], yerr=[[low], [high]], fmt="o", capsize=3, color=colour_of(str(r["dtype"]))
        )
        axes.annotate(str(r["dtype"]), (bits, r["kl_mean"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits per element, every parameter counted")
    axes.set_ylabel("KL to 16 bit, nats a token")
    return figure


def by_position(results: Results) -> Figure | None:
    """KL along the context: does it grow towards the end?"""
    shown = [r for r in results if any(p["kl_mean"] > 0 for p in r.get("by_position", ()))]
    if not shown:
        return None
    figure, axes = _figure(6.4, 3.8)
    for r in shown:
        middle = [(p["begin"] + p["end"]) / 2 for p in r["by_position"]]
        kl = [max(p["kl_mean"], _LEAST_KL) for p in r["by_position"]]
        axes.plot(middle, kl, marker="o", ms=3, label=str(r["dtype"]), color=colour_of(str(r["dtype"])))
    axes.set_yscale("log")
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("KL to 16 bit, nats a token")
    axes.legend(fontsize=8)
    return figure


def by_layer(results: Results) -> Figure | None:
    """Relative error of every layer's attention output."""
    shown = [r for r in results if "by_layer" in r]
    if not shown:
        return None
    figure, axes = _figure(6.4, 3.8)
    for r in shown:
        layers = r["by_layer"]["layers"]
        axes.plot(
            [v["layer"] for v in layers],
            [max(v["error"], _LEAST_KL) for v in layers],
            marker="o", ms=3, label=str(r["dtype"]), color=colour_of(str(r["dtype"])),
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of attention's output")
    axes.legend(fontsize=8)
    return figure


def tasks(results: Results) -> Figure | None:
    """Log-probability of the right answers that each dtype loses, task by task, with intervals."""
    shown = [r for r in results if r.get("tasks") and r["dtype"] != "bf16"]
    if not shown:
        return None
    names = list(dict.fromkeys(name for r in shown for name in r["tasks"]))
    figure, axes = _figure(8.2, 3.8)
    width = 0.8 / len(shown)
    for index, r in enumerate(shown):
        lost = [r["tasks"][n]["logprob_lost_per_token"] for n in names]
        mean = [v["mean"] for v in lost]
        bars = [[max(0.0, v["mean"] - v["low"]) for v in lost], [max(0.0, v["high"] - v["mean"]) for v in lost]]
        place = np.arange(len(names)) + (index - (len(shown) - 1) / 2) * width
        axes.bar(place, mean, width, yerr=bars, capsize=2, label=str(r["dtype"]), color=colour_of(str(r["dtype"])))
    axes.set_xticks(range(len(names)), names)
    axes.axhline(0, color="#444", lw=0.8)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylabel("log-probability lost, nats a token")
    axes.legend(fontsize=8)
    return figure


def heat_map(results: Results, task: str) -> Figure | None:
    """Depth by length of a task: the right answer's log-probability at 16 bit, and what each dtype loses of it."""
    shown = [r for r in results if task in r.get("tasks", {}) and r["dtype"] != "bf16"]
    if not shown or "depth" not in shown[0]["tasks"][task]["cells"][0]:
        return None
    cells = shown[0]["tasks"][task]["cells"]
    lengths, depths = (sorted({c[label] for c in cells}) for label in ("length", "depth"))
    first = _grid(cells, lengths, depths, lambda c: c["logprob_per_token_16bit"])
    lost = [_grid(r["tasks"][task]["cells"], lengths, depths, _lost) for r in shown]
    most = max(0.05, *(float(np.nanmax(np.abs(grid))) for grid in lost))
    # Figure itself, not pyplot: no global state and no display needed.
    figure = Figure(figsize=(2.3 + 1.9 * len(lost), 3.3), layout="constrained")
    panels = figure.subplots(1, 1 + len(lost), sharey=True)
    titles = ["16 bit: log-prob.", *(f"{r['dtype']}: lost" for r in shown)]
    for axes, grid, title in zip(panels, [first, *lost], titles, strict=True):
        is_first = grid is first
        scale = {"cmap": "viridis"} if is_first else {"cmap": "RdYlGn_r", "vmin": -most, "vmax": most}
        axes.imshow(grid, aspect="auto", origin="upper", **scale)
        for (row, column), value in np.ndenumerate(grid):
            paper = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, bbox=paper)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths], fontsize=7)
        axes.set_title(title, fontsize=8)
    panels[0].set_ylabel("depth of the answer", fontsize=8)
    figure.supxlabel("length of the prompt, tokens", fontsize=8)
    return figure


def _lost(cell: Mapping[str, Any]) -> float:
    lost: float = cell["logprob_per_token_16bit"] - cell["logprob_per_token"]
    return lost


def _grid(
    cells: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    depths: Sequence[float],
    value: Callable[[Mapping[str, Any]], float],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    grid = np.full((len(depths), len(lengths)), math.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = value(cell)
    return grid


def generation(results: Results) -> Figure | None:
    """Repetition, perplexity to 16 bit and how long the greedy text stays the 16-bit cache's."""
    shown = [r for r in results if "generation" in r]
    if not shown:
        return None
    figure = Figure(figsize=(9.2, 3.0), layout="constrained")
    panels = figure.subplots(1, 3)
    names = [str(r["dtype"]) for r in shown]
    drawn, greedy = ([r["generation"][mode] for r in shown] for mode in ("drawn", "greedy"))
    for axes, title, values in (
        (panels[0], "repeated 4-grams, drawn text, %", [100 * g["repeated_4grams"] for g in drawn]),
        (panels[1], "perplexity of the drawn text to 16 bit", [g["self_perplexity"] for g in drawn]),
        (panels[2], "greedy tokens before it parts", [g["same_tokens"] for g in greedy]),
    ):
        bars = axes.bar(names, values, color=[colour_of(name) for name in names], width=0.6)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylim(0, 1.18 * max(*values, 1e-9))
        axes.set_yticks([])
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    return figure, axes


def draw_all(results: Results) -> dict[str, Figure]:
    """Every picture that the results have something for, by a name for its file."""
    found: dict[str, Figure | None] = {
        "bits-and-kl": bits_and_kl(results),
        "by-position": by_position(results),
        "by-layer": by_layer(results),
        "tasks": tasks(results),
    }
    for task in ("passkey", "needle"):
        found[task] = heat_map(results, task)
    found["generation"] = generation(results)
    return {name: figure for name, figure in found.items() if figure is not None}
