"""Tables and pictures of what evidence.py found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from report import Row, table

from kvbits.planning.colours import colour_of

Found = dict[str, dict[str, dict[str, Any]]]
"""What a stage returned, by stage and model."""


def write_tables(out: Path) -> None:
    """``tables.md`` and the pictures, from every result below ``out``."""
    found = read(out)
    parts = [f"## {title}\n\n{table(rows)}" for title, rows in tables(found) if rows]
    if parts:
        (out / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(out / "tables.md")
    for name, figure in pictures(found):
        figure.savefig(out / f"{name}.png", dpi=110)
        print(out / f"{name}.png")


def read(out: Path) -> Found:
    found: Found = {}
    for path in sorted(out.glob("*/*.json")):
        if "." in path.stem:  # half-written
            continue
        found.setdefault(path.stem, {})[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def tables(found: Found) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of every table for which there is something."""
    for model, fidelity in found.get("fidelity", {}).items():
        rows = [_fidelity(row) for row in fidelity["rows"]]
        rows += [_llama(row) for row in found.get("llama", {}).get(model, {}).get("rows", ())]
        yield f"{model}, {fidelity['rows'][0]['windows']} windows of 2,048", rows
    for stage, name in (("positions", "By position"), ("written", "Text that the model wrote itself")):
        for model, result in found.get(stage, {}).items():
            yield f"{name}: {model}", [_stretches(row) for row in result["rows"]]
    for model, result in found.get("llama-long", {}).items():
        second = f"{result['context'] // 2:,} to {result['context']:,}"
        ours = [_fidelity(row) for row in found.get("positions", {}).get(model, {}).get("rows", ())]
        yield f"{model}, one window, tokens {second}", ours + [_llama(row) for row in result["rows"]]
    for stage in sorted((s for s in found if s.startswith("retrieval")), key=lambda s: int(s[10:-1])):
        for model, result in found[stage].items():
            yield f"{model}, prompts of {result['length']:,} tokens", [_retrieval(row) for row in result["rows"]]
    for stage, name in (("tools", "BFCL tool calls"), ("gsm8k", "GSM8K")):
        for model, result in found.get(stage, {}).items():
            yield f"{name}: {model}", [_paired(row["dtype"], row[stage]) for row in result["rows"]]


def _fidelity(row: Mapping[str, Any]) -> Row:
    return {
        "cache": _named(row["dtype"]),
        "bits": f"{row['bits_per_element']:.2f}",
        "all bits, 2K": f"{row['bits_2048']:.2f}",
        "8K": f"{row['bits_8192']:.2f}",
        "KL mean": _kl(row["kl_mean"]),
        "KL 99 %": _kl(row["kl_p99"]),
        "KL maximum": f"{row['kl_max']:.2g}",
        "perplexity": f"{100 * (row['perplexity'] / row['perplexity_16bit'] - 1):+.2f} %",
        "same top token": f"{100 * row['top1_agreement']:.1f} %",
    }


def _llama(row: Mapping[str, Any]) -> Row:
    bits = f"{row['bits_per_element']:.2f}"
    return {
        "cache": f"llama.cpp {row['key']} / {row['value']}",
        "bits": bits,
        "all bits, 2K": bits,
        "8K": bits,
        "KL mean": _kl(row["kl_mean"]),
        "KL 99 %": _kl(row["kl_p99"]),
        "KL maximum": f"{row['kl_max']:.2g}",
        "perplexity": f"{100 * (row['perplexity'] / row['perplexity_base'] - 1):+.2f} %",
        "same top token": f"{row['same_top_percent']:.1f} %",
    }


def _stretches(row: Mapping[str, Any]) -> Row:
    return {"cache": _named(row["dtype"])} | {
        f"{p['begin']:,} to {p['end']:,}": _kl(p["kl_mean"]) for p in row["by_position"]
    }


def _retrieval(row: Mapping[str, Any]) -> Row:
    """Right answers of all, and the log-probability a token that the right answers lost."""
    found: Row = {"cache": _named(row["dtype"])}
    for name, task in row["tasks"].items():
        right, base = (round(task[k] * task["questions"]) for k in ("exact", "exact_16bit"))
        found[name] = f"{right} / {base} of {task['questions']}, {task['logprob_lost_per_token']['mean']:+.3f}"
    return found


def _paired(dtype: str, figures: Mapping[str, Any]) -> Row:
    same = {"same call": figures["same"]} if "same" in figures else {"same number": figures["same_number"]}
    return {
        "cache": _named(dtype),
        "right": f"{figures['right']} of {figures['questions']}",
        "16 bit": figures["right_16bit"],
        "lost": figures["lost"],
        "won": figures["won"],
        "p (McNemar)": f"{figures['p']:.2f}",
        **same,
    }


def _named(dtype: str) -> str:
    return f"`--bits {dtype}`" if dtype[0].isdigit() else f"`{dtype}`"


def _kl(value: float) -> str:
    return f"{value:.5f}" if value < 0.001 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def pictures(found: Found) -> Iterator[tuple[str, Figure]]:
    """KL over bits beside llama.cpp's, and KL along the context, a field for each model."""
    if "fidelity" in found:
        yield "evidence-bits", _fields(found["fidelity"], partial(_bits, found))
    for stage in ("positions", "written"):
        if stage in found:
            yield f"evidence-{stage}", _fields(found[stage], partial(_along, found[stage]))


def _fields(models: Mapping[str, Any], draw: Callable[[Any, str], None]) -> Figure:
    figure = Figure(figsize=(3.1 * len(models), 3.3), layout="constrained")
    fields = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(fields, models, strict=True):
        draw(axes, model)
        axes.set_title(model, fontsize=10)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    fields[0].set_ylabel("KL to 16 bit, nats a token")
    fields[0].legend(fontsize=7)
    return figure


def _bits(found: Found, axes: Any, model: str) -> None:
    """Bits of everything that a sequence of 8,192 tokens holds."""
    rows = found["fidelity"][model]["rows"]
    for label, kind in (("one dtype everywhere", False), ("calibrated", True)):
        mine = sorted((r["bits_8192"], r["kl_mean"]) for r in rows if r["dtype"][0].isdigit() is kind)
        axes.plot(*zip(*mine, strict=True), marker="o", ms=4, label=label)
    llama = found.get("llama", {}).get(model, {}).get("rows", ())
    if llama:
        theirs = sorted((r["bits_per_element"], r["kl_mean"]) for r in llama)
        axes.plot(*zip(*theirs, strict=True), marker="s", ms=4, label="llama.cpp", color="#9ca3af")
    axes.set_xlabel("bits an element, 8,192 tokens")


def _along(results: Mapping[str, Any], axes: Any, model: str) -> None:
    for row in results[model]["rows"]:
        middle = [(p["begin"] + p["end"]) / 2 for p in row["by_position"]]
        kl = [p["kl_mean"] for p in row["by_position"]]
        axes.plot(middle, kl, marker="o", ms=3, label=row["dtype"], color=colour_of(row["dtype"]))
    axes.set_xlabel("position, tokens")
