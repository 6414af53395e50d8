"""Bars of the peers' speed, one panel for each case, with the range of the repeats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from peers.case import Case, Peer, label
from peers.results import FIGURES, Results, label_of

_COLORS = {
    "kvbits": "#c0392b",
    "llama.cpp": "#2c7fb8",
    "OpenVINO GenAI": "#7fbf7b",
    "transformers": "#969696",
    "vLLM": "#e0a030",
}


def draw(results: Results, peers: Sequence[Peer], cases: Sequence[Case], path: Path) -> None:
    """Prefill above, decode below; a horizontal bar for each engine, whiskers from least to greatest."""
    by_key = {(label_of(row), row["batch"], row["context"]): row for row in results.rows()}
    size = (1.5 + 2.6 * len(cases), 1.6 + 0.44 * len(peers))
    figure, axes = pyplot.subplots(2, len(cases), figsize=size, squeeze=False, sharey=True)
    names = [label(peer).replace(":", "  ") for peer in peers]
    for line, name in enumerate(FIGURES):
        for column, case in enumerate(cases):
            axis = axes[line][column]
            for place, peer in enumerate(peers):
                row = by_key.get((label(peer), case.batch, case.context))
                if row is None:
                    continue
                middle = row[name]
                whiskers = [[middle - row[f"{name}_min"]], [row[f"{name}_max"] - middle]]
                axis.barh(place, middle, xerr=whiskers, color=_COLORS[peer.system], error_kw={"lw": 0.8, "capsize": 2})
                axis.text(
                    row[f"{name}_max"], place, f" {middle:,.{0 if middle >= 10 else 1}f}", va="center", fontsize=7
                )
            axis.set_yticks(range(len(peers)), names, fontsize=7)
            axis.tick_params(axis="x", labelsize=7)
            axis.margins(x=0.18)
            axis.set_xlim(left=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{name.split('_')[0]}, {case}", fontsize=8)
    axes[0][0].invert_yaxis()  # the axis is shared by all panels
    figure.supxlabel("tokens per second, all sequences (batch x context)", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
