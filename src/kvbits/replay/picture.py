"""A run as a picture: latencies over time, their distribution, tokens per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from kvbits.files import replacing
from kvbits.replay.run import Outcome

_BLUE, _ORANGE, _RED = "#4477aa", "#ee8833", "#cc3333"


def draw(outcome: Outcome, figures: Mapping[str, Any], title: str, path: Path) -> None:
    """Write the picture. Raises ``OSError`` where that is not possible."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [r for r in outcome.records if r.error is None]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    axes[0].scatter([r.begin for r in good], [r.first or 0.0 for r in good], s=9, c=_BLUE, label="first token")
    axes[0].scatter([r.begin for r in good], [r.whole for r in good], s=9, c=_ORANGE, label="whole answer")
    failed = [r for r in outcome.records if r.error is not None]
    axes[0].scatter([r.begin for r in failed], [r.whole for r in failed], s=16, c=_RED, marker="x", label="failed")
    axes[0].set(xlabel="sent, s after the start", ylabel="seconds", title="each request")
    axes[0].legend(fontsize=7)
    _distribution(axes[1], "first token", [r.first for r in good if r.first is not None], _BLUE)
    _distribution(axes[1], "between tokens", [gap for r in good for gap in r.between], _ORANGE)
    axes[1].set(xlabel="seconds", ylabel="share of at most this", title="latencies", xscale="log", ylim=(0, 1.01))
    axes[1].grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="lower right")
    ends = [r.begin + r.whole for r in good]
    bins = numpy.linspace(0.0, max(outcome.seconds, 1e-3), 41)
    tokens, _ = numpy.histogram(ends, bins, weights=[r.output_tokens for r in good])
    axes[2].bar(bins[:-1], tokens / (bins[1] - bins[0]), width=bins[1] - bins[0], align="edge", color=_BLUE)
    mean = figures["output_tokens_per_s"]
    axes[2].axhline(mean, color=_ORANGE, lw=1, label=f"mean {mean:,.1f}")
    axes[2].set(xlabel="s after the start", ylabel="new tokens a second", title="answers, by their end")
    axes[2].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    with replacing(path) as place:
        figure.savefig(place, dpi=120)
    pyplot.close(figure)


def _distribution(axis: Any, name: str, values: Sequence[float], colour: str) -> None:
    if values:
        axis.plot(numpy.sort(values), numpy.arange(1, len(values) + 1) / len(values), color=colour, label=name)
