"""The demo's picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbits.evaluation.demo import Showing
from kvbits.files import replacing
from kvbits.planning.colours import colour_of


def draw(shown: Sequence[Showing], memory: int, path: Path) -> None:
    """Bars of what each dtype buys (sessions, bytes, speed) and costs (KL, answers), written to ``path`` as PNG."""
    # Figure itself, not pyplot: no global state and no display needed.
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    figure.suptitle(f"The same conversations from {memory / 2**20:,.0f} MiB of KV cache", fontsize=13)
    axes = figure.subplots(2, 3).flat
    _bars(next(axes), shown, "sessions at once", [s.sessions_admitted for s in shown], "{:.0f}")
    _bars(next(axes), shown, "KV bytes per token", [s.kv_bytes_per_token for s in shown], "{:,.0f}")
    _bars(next(axes), shown, "decode, tokens/s (all sessions)", [s.decode_tokens_per_s for s in shown], "{:,.0f}")
    _bars(next(axes), shown, "KL to 16 bit, nats (mean)", [s.kl_mean for s in shown], "{:.2g}")
    _bars(next(axes), shown, "same top token, %", [100 * s.top1_agreement for s in shown], "{:.1f}")
    _bars(next(axes), shown, "answers found", [s.answers_found for s in shown], "{:.0f}", shown[0].answers_total)
    with replacing(path) as place:
        figure.savefig(place, dpi=140)


def _bars(
    axes: Axes, shown: Sequence[Showing], title: str, values: Sequence[float], label: str, top: float | None = None
) -> None:
    bars = axes.bar([s.dtype for s in shown], values, color=[colour_of(s.dtype) for s in shown], width=0.6)
    axes.bar_label(bars, [label.format(v) for v in values], padding=2)
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, 1.18 * (top or max(*values, 1e-9)))
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
