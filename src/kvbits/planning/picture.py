"""The plan's picture: sessions against context, one line a dtype."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from kvbits.files import replacing
from kvbits.planning.colours import colour_of, dash_of
from kvbits.planning.core import Plan

GIB = 1 << 30


def draw(plan: Plan, path: Path) -> None:
    """Write ``plan`` as a picture in the format of ``path``'s suffix. Contexts at which nothing fits are left out."""
    # Figure itself, not pyplot: no global state and no display needed.
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for scheme in plan.schemes:
        points = sorted((c.context, c.sessions) for c in scheme.contexts if c.sessions)
        label = f"{scheme.dtype}  ({scheme.bits_per_element:.2f} bits)"
        axes.plot([c for c, _ in points], [n for _, n in points], marker="o", markersize=3, label=label,
                  color=colour_of(scheme.dtype), linestyle=dash_of(scheme.dtype))  # fmt: skip
    if plan.max_num_seqs is not None:
        axes.axhline(plan.max_num_seqs, color="0.6", linestyle=":", label=f"max_num_seqs {plan.max_num_seqs}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context of each session, tokens")
    axes.set_ylabel("sessions at once")
    axes.set_title(f"{plan.model}: {plan.cache_bytes / GIB:,.1f} GiB of KV cache")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(plan.schemes) > 8 else 1)
    with replacing(path) as place:
        figure.savefig(place, dpi=140)
