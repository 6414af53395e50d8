"""The page's interactive plots. Each is an HTML fragment, or ``None`` where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import plotly.graph_objects as go

from kvbits.planning.colours import colour_of, plotly_dash_of
from kvbits.report.gather import Gathered, Record

LEAST = 1e-7
"""KL values below this are drawn at it: the axis is logarithmic."""

Figure: TypeAlias = Any
"""A ``plotly.graph_objects.Figure``: plotly has no types."""


def draw_all(found: Gathered) -> list[tuple[str, str, str]]:
    """``(anchor, caption, html)`` of every plot that the results allow."""
    drawn: list[tuple[str, str, Callable[[Gathered], Figure | None]]] = [
        ("pareto", "What the bits buy: fewer bits and less KL are better. Line: nothing measured is better in both.",
         pareto),
        ("sensitivity", "What each layer's keys and values would lose on their own: predicted KL by calibration.",
         sensitivity),
        ("policy", "Bits that a calibrated policy gives each layer's keys and values.", allocation),
        ("layers", "Error of each layer's attention output when only that layer reads the quantized cache.", layers),
        ("position", "Quality against the position in the context: does the end of a long context suffer?", position),
        ("capacity", "Sessions that fit against their context, both axes logarithmic.", capacity),
        ("speed", "Decoding and prefill speed.", speed),
        ("traffic", "A production trace: mean wait for admission at each load.", traffic),
    ]  # fmt: skip
    shown: list[tuple[str, str, str]] = []
    for anchor, caption, build in drawn:
        figure = build(found)
        if figure is not None:
            shown.append((anchor, caption, _html(figure, anchor)))
    return shown


def _look(dtype: str) -> dict[str, Any]:
    """Name and line of a dtype."""
    return {"name": dtype, "line": {"color": colour_of(dtype), "dash": plotly_dash_of(dtype)}}


def pareto(found: Gathered) -> Figure | None:
    """KL over bits, with intervals where they were measured."""
    rows = [r for r in found.evaluated if r.get("kl_mean", 0) > 0]
    if not rows:
        return None
    figure = go.Figure()
    front: list[Record] = []
    for row in sorted(rows, key=lambda r: (r["bits_per_element"], r["kl_mean"])):
        if not front or row["kl_mean"] < front[-1]["kl_mean"]:
            front.append(row)
    figure.add_scatter(
        x=[r["bits_per_element"] for r in front], y=[r["kl_mean"] for r in front],
        mode="lines", line={"color": "#b9c2cc", "dash": "dot"}, name="best so far", hoverinfo="skip",
    )  # fmt: skip
    for row in rows:
        interval = row.get("kl_interval", {"low": row["kl_mean"], "high": row["kl_mean"]})
        figure.add_scatter(
            x=[row["bits_per_element"]], y=[row["kl_mean"]], mode="markers+text", name=row["dtype"],
            text=[row["dtype"]], textposition="top right", marker={"size": 10, "color": colour_of(row["dtype"])},
            error_y={"type": "data", "symmetric": False, "array": [interval["high"] - row["kl_mean"]],
                     "arrayminus": [row["kl_mean"] - interval["low"]]},
            hovertemplate="%{x:.2f} bits<br>KL %{y:.3g}<br>perplexity "
            f"{row['perplexity']:.3f} ({100 * (row['perplexity'] / row['perplexity_16bit'] - 1):+.2f} %)",
        )  # fmt: skip
    figure.update_yaxes(type="log", title="KL to 16 bit, nats a token")
    figure.update_xaxes(title="bits per element, every parameter counted")
    return figure


def sensitivity(found: Gathered) -> Figure | None:
    """A heat map a dtype, keys and values by layer; a menu chooses the dtype."""
    tables = [p["measured"]["sensitivity"] for p in found.policies if p.get("measured", {}).get("sensitivity")]
    if not tables:
        return None
    table = tables[-1]
    figure = go.Figure()
    names = list(table)
    first = "int4" if "int4" in names else names[0]
    for name in names:
        grid = [[_log(x) for x in table[name][side]] for side in ("value", "key")]
        raw = [table[name][side] for side in ("value", "key")]
        figure.add_heatmap(
            z=grid, customdata=raw, y=["values", "keys"], visible=name == first, colorscale="Viridis",
            colorbar={"title": "log10 KL"}, hovertemplate="layer %{x}, %{y}: KL %{customdata:.3g}<extra></extra>",
        )  # fmt: skip
    buttons = [{"label": n, "method": "update", "args": [{"visible": [m == n for m in names]}]} for n in names]
    figure.update_layout(updatemenus=[{"buttons": buttons, "active": names.index(first), "x": 0, "y": 1.25}])
    figure.update_xaxes(title="layer")
    return figure


def allocation(found: Gathered) -> Figure | None:
    """Dtypes of every calibrated policy, one row of keys and one of values each."""
    if not found.policies:
        return None
    labels, bits, words = [], [], []
    for policy in found.policies:
        pairs = [(name.split("/")[0], name.split("/")[-1]) for name in policy["layers"]]
        for side, what in ((1, "values"), (0, "keys")):
            labels.append(f"{policy['name']}: {what}")
            words.append([pair[side] for pair in pairs])
            bits.append([_width(pair[side]) for pair in pairs])
    figure = go.Figure(
        go.Heatmap(z=bits, y=labels, text=words, texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=16,
                   colorbar={"title": "bits"}, hovertemplate="layer %{x}, %{y}: %{text}<extra></extra>")
    )  # fmt: skip
    figure.update_xaxes(title="layer")
    figure.update_layout(height=140 + 46 * len(labels))
    return figure


def layers(found: Gathered) -> Figure | None:
    """Relative error of each layer's attention output."""
    rows = [r for r in found.evaluated if "by_layer" in r]
    if not rows:
        return None
    figure = go.Figure()
    for row in rows:
        parts = row["by_layer"]["layers"]
        figure.add_scatter(x=[p["layer"] for p in parts], y=[p["error"] for p in parts], **_look(row["dtype"]))
    figure.update_yaxes(type="log", title="relative error")
    figure.update_xaxes(title="layer")
    return figure


def position(found: Gathered) -> Figure | None:
    """KL along the context."""
    rows = [r for r in found.evaluated if any(p["kl_mean"] > 0 for p in r.get("by_position", ()))]
    if not rows:
        return None
    figure = go.Figure()
    for row in rows:
        parts = row["by_position"]
        middle = [(p["begin"] + p["end"]) / 2 for p in parts]
        figure.add_scatter(x=middle, y=[max(p["kl_mean"], LEAST) for p in parts], **_look(row["dtype"]))
    figure.update_yaxes(type="log", title="KL to 16 bit, nats a token")
    figure.update_xaxes(title="position in the context, tokens")
    return figure


def capacity(found: Gathered) -> Figure | None:
    """Sessions against context for each planned dtype."""
    figure = go.Figure()
    for plan in found.plans:
        for scheme in plan["schemes"]:
            points = sorted(
                (c["context"], c["sessions"]) for c in scheme.get("range", scheme["contexts"]) if c["sessions"]
            )
            name = f"{scheme['dtype']} ({scheme['bits_per_element']:.2f} bits)"
            figure.add_scatter(x=[c for c, _ in points], y=[n for _, n in points], mode="lines+markers",
                               **_look(scheme["dtype"]) | {"name": name})  # fmt: skip
    if not figure.data:
        return None
    figure.update_xaxes(type="log", title="context of each session, tokens")
    figure.update_yaxes(type="log", title="sessions at once")
    return figure


def speed(found: Gathered) -> Figure | None:
    """Bars of decoding, and of prefill on their own axis."""
    if not found.timed:
        return None
    names = [_timed(row) for row in found.timed]
    figure = go.Figure()
    figure.add_bar(x=names, y=[r["decode_tokens_per_s"] for r in found.timed], name="decode, tokens/s", offsetgroup=0)
    figure.add_bar(
        x=names, y=[r["prefill_tokens_per_s"] for r in found.timed], name="prefill, tokens/s", yaxis="y2", offsetgroup=1
    )
    figure.update_layout(
        yaxis={"title": "decode, tokens/s, all sequences"},
        yaxis2={"title": "prefill, tokens/s", "overlaying": "y", "side": "right", "showgrid": False},
    )
    return figure


def traffic(found: Gathered) -> Figure | None:
    """Mean wait over load, one line a dtype."""
    runs = [run for plan in found.plans for run in plan.get("trace", {}).get("runs", ())]
    if not runs:
        return None
    figure = go.Figure()
    for dtype in dict.fromkeys(run["dtype"] for run in runs):
        own = sorted((r["load"], r["wait_mean_s"], r["preempted"]) for r in runs if r["dtype"] == dtype)
        figure.add_scatter(
            x=[x for x, _, _ in own], y=[y for _, y, _ in own], customdata=[z for _, _, z in own], **_look(dtype),
            mode="lines+markers", hovertemplate="load %{x}: %{y:.1f} s, %{customdata} preempted",
        )  # fmt: skip
    figure.update_xaxes(title="load (1: as recorded)")
    figure.update_yaxes(title="mean wait for admission, s")
    return figure


def _timed(row: Record) -> str:
    return f"{row['dtype']}<br>{row['batch']} x {row['context']:,}"


def _log(value: float | None) -> float | None:
    return None if value is None else math.log10(max(value, LEAST))


def _width(dtype: str) -> int:
    """The number in a dtype's name: ``int4`` has 4 bits, ``fp8_e4m3`` 8."""
    digits = "".join(c if c.isdigit() else " " for c in dtype).split()
    return int(digits[0]) if digits else 16


def _html(figure: Figure, anchor: str) -> str:
    layout: dict[str, Any] = {"template": "plotly_white", "margin": {"l": 70, "r": 30, "t": 40, "b": 60}}
    figure.update_layout(**layout)
    if figure.layout.height is None:
        figure.update_layout(height=400)
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{anchor}")
    return text
