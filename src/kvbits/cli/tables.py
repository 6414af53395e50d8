"""The laboratory's results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def print_results(rows: Sequence[Row]) -> None:
    """A table for every kind of result that is there, then the verdicts."""
    console = Console()
    if "kl_mean" in rows[0]:
        first = rows[0]
        title = f"{first['windows']} windows of {first['context']} tokens; 16 bit: {first['perplexity_16bit']:.3f}"
        console.print(_table(title, rows, _FIDELITY))
    for task in dict.fromkeys(name for row in rows for name in row.get("tasks", {})):
        found = [{"dtype": row["dtype"], **row["tasks"][task]} for row in rows]
        title = f"{task}: {found[0]['questions']} questions; right at 16 bit: {100 * found[0]['exact_16bit']:.0f} %"
        console.print(_table(title, found, _TASK))
    if "generation" in rows[0]:
        found = [{"dtype": row["dtype"], **row["generation"]} for row in rows]
        title = f"{found[0]['drawn']['texts']} texts of {found[0]['drawn']['new_tokens']} tokens"
        console.print(_table(title, found, _GENERATION))
    if "tools" in rows[0]:
        found = [{"dtype": row["dtype"], **row["tools"]} for row in rows]
        console.print(_table(f"tool calls: {found[0]['questions']} questions", found, _TOOLS))
    if "gsm8k" in rows[0]:
        found = [{"dtype": row["dtype"], **row["gsm8k"]} for row in rows]
        console.print(_table(f"gsm8k: {found[0]['questions']} problems", found, _PROBLEMS))
    for row in rows:
        console.print(f"{row['dtype']}: [bold]{row['verdict']}[/bold]", highlight=False)
        for reason in row["reasons"]:
            console.print(f"  {reason}", highlight=False)


def _table(title: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
    table = Table(title=title)
    table.add_column("KV cache")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["dtype"]), *(show(row) for show in columns.values()))
    return table


_FIDELITY: dict[str, Callable[[Row], str]] = {
    "bits": lambda r: f"{r['bits_per_element']:.2f}",
    "all bits": lambda r: f"{r['effective_bits_per_element']:.2f}",
    "perplexity": lambda r: f"{r['perplexity']:.3f}",
    "change": lambda r: f"{100 * (r['perplexity'] / r['perplexity_16bit'] - 1):+.2f} %",
    "KL mean": lambda r: f"{r['kl_mean']:.2g}",
    "KL 99 %": lambda r: f"{r['kl_p99']:.2g}",
    "same top": lambda r: f"{100 * r['top1_agreement']:.1f} %",
}
_TASK: dict[str, Callable[[Row], str]] = {
    "right": lambda r: f"{100 * r['exact']:.0f} %",
    "log-prob. lost, nats a token": lambda r: _interval(r["logprob_lost_per_token"]),
    "right answers lost": lambda r: _interval(r["exact_lost"]),
}
_GENERATION: dict[str, Callable[[Row], str]] = {
    "greedy: same tokens": lambda r: f"{r['greedy']['same_tokens_median']:.0f}",
    "loops": lambda r: f"{100 * r['greedy']['loops']:.0f} %",
    "drawn: repeated 4-grams": lambda r: f"{100 * r['drawn']['repeated_4grams']:.1f} %",
    "distinct-2": lambda r: f"{r['drawn']['distinct_2']:.3f}",
    "perplexity to 16 bit": lambda r: f"{r['drawn']['self_perplexity']:.2f}",
}
_TOOLS: dict[str, Callable[[Row], str]] = {
    "valid": lambda r: f"{r['valid']}",
    "valid at 16 bit": lambda r: f"{r['valid_16bit']}",
    "still valid": lambda r: f"{r['still_valid']}",
    "same name": lambda r: f"{r['same_name']}",
    "same call": lambda r: f"{r['same']}",
    "right": lambda r: _paired(r),
}
_PROBLEMS: dict[str, Callable[[Row], str]] = {
    "right": lambda r: _paired(r),
    "right at 16 bit": lambda r: f"{r['right_16bit']}",
    "same number": lambda r: f"{r['same_number']}",
    "same text": lambda r: f"{r['same_text']}",
}


def _paired(row: Row) -> str:
    return f"{row['right']} ({row['lost']} lost, {row['won']} won, p {row['p']:.2f})"


def _interval(value: Row) -> str:
    return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"
