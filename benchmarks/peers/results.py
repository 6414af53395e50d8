"""Measurements of one run: kept raw, summarised as medians with their range, written as JSON and Markdown."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import describe
from report import spread, write

from peers.case import Case, Measurement, Peer, label
from peers.repack import FLAG, REASON

FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass
class Results:
    """Every sample and every failure, in the order in which they were measured."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    samples: dict[tuple[Peer, Case], list[Measurement]] = field(default_factory=dict)
    starts: dict[Peer, list[float]] = field(default_factory=dict)
    broken: dict[Peer, str] = field(default_factory=dict)
    """Engines that did not answer at all, with what they said."""
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, peer: Peer, case: Case, measurement: Measurement) -> None:
        self.samples.setdefault((peer, case), []).append(measurement)

    def add_start(self, peer: Peer, seconds: float) -> None:
        self.starts.setdefault(peer, []).append(seconds)

    def fail(self, peer: Peer, case: Case, reason: str) -> None:
        self.failures.append(_keys(peer, case) | {"reason": reason})

    def failed(self, peer: Peer, case: Case) -> bool:
        keys = _keys(peer, case)
        return peer in self.broken or any(
            all(failure[key] == value for key, value in keys.items()) for failure in self.failures
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row for each engine and case: medians, least and greatest."""
        rows = []
        for (peer, case), found in self.samples.items():
            row = _keys(peer, case)
            for name in FIGURES:
                row |= spread(name, [getattr(measurement, name) for measurement in found])
            row |= {
                "repeats": len(found),
                "prefill_sequences": found[0].prefill_sequences,
                **(spread("ready_s", self.starts[peer]) if peer in self.starts else {}),
                "peak_rss_bytes": max(measurement.peak_rss_bytes for measurement in found),
                "wall_s": statistics.median(measurement.wall_s for measurement in found),
                "new_tokens": case.new_tokens,
                "threads": case.threads,
                "command": shlex.join(peer.command(case)),
                "samples": [asdict(measurement) for measurement in found],
            }
            rows.append(row)
        return rows

    def write(self, path: Path, text: str | None = None) -> None:
        """The whole run as JSON, and ``text`` beside it."""
        silent = [
            {"system": p.system, "kv_dtype": p.kv_dtype, "weights": p.weights, "reason": r}
            for p, r in self.broken.items()
        ]
        found = {"rows": self.rows(), "failures": self.failures, "no_start": silent}
        write(path, {"machine": self.machine, "settings": self.settings, **found}, text)


def _keys(peer: Peer, case: Case) -> dict[str, Any]:
    return {
        "system": peer.system,
        "kv_dtype": peer.kv_dtype,
        "weights": peer.weights,
        "batch": case.batch,
        "context": case.context,
    }


def markdown(results: Results, peers: Sequence[Peer], cases: Sequence[Case]) -> str:
    """Decode and prefill tables (medians, least to greatest in brackets), then command lines and failures."""
    by_key = {(label_of(row), row["batch"], row["context"]): row for row in results.rows()}
    lines = [describe(results.machine), ""]
    if "read_bandwidth_gb_per_s" in results.settings:
        lines += [f"Read bandwidth before the run: {results.settings['read_bandwidth_gb_per_s']:.1f} GB/s.", ""]
    lines += ["Medians, least to greatest in brackets.", ""]
    for figure, title in zip(FIGURES, ("Prefill", "Decode"), strict=True):
        lines += [f"## {title}, tokens per second of all sequences", ""]
        lines.append("| system | KV cache | weights | " + " | ".join(map(str, cases)) + " |")
        lines.append("|---" * (3 + len(cases)) + "|")
        for peer in peers:
            cells = [_cell(by_key.get((label(peer), case.batch, case.context)), figure) for case in cases]
            lines.append(f"| {peer.system} | {peer.kv_dtype} | {peer.weights} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += _starts(results, peers, cases, by_key)
    lines.append("llama.cpp computes one prompt and copies it (its prefill is one sequence's); the others compute all.")
    commands = [peer.command(cases[-1]) for peer in peers]
    starts = [peer.start(cases[-1].threads) for peer in peers]
    if any(FLAG in command for command in commands):
        lines.append(REASON)
    lines += ["", "## Command lines", ""]
    lines += [
        f"- {label(peer)}, {cases[-1]}: `{shlex.join(command)}`" for peer, command in zip(peers, commands, strict=True)
    ]
    lines += [f"- {label(peer)}, start: `{shlex.join(command)}`" for peer, command in zip(peers, starts, strict=True)]
    if results.failures or results.broken:
        lines += ["", "## Not measured", ""]
        for failure in results.failures:
            head = failure["reason"].splitlines()[0]
            lines.append(f"- {label_of(failure)} at {failure['batch']} x {failure['context']}: {head}")
        lines += [f"- {label(peer)}: {reason.splitlines()[0]}" for peer, reason in results.broken.items()]
    return "\n".join(lines) + "\n"


def _starts(
    results: Results, peers: Sequence[Peer], cases: Sequence[Case], by_key: dict[tuple[str, int, int], dict[str, Any]]
) -> list[str]:
    """Time to ready, and the greatest memory of each case."""
    lines = ["## Time from the command to the end of a few tokens, s; peak memory, MiB", ""]
    lines.append("| system | KV cache | weights | ready | " + " | ".join(f"MiB {case}" for case in cases) + " |")
    lines.append("|---" * (4 + len(cases)) + "|")
    for peer in peers:
        found = [by_key.get((label(peer), case.batch, case.context)) for case in cases]
        cells = ["-" if row is None else f"{row['peak_rss_bytes'] / 2**20:,.0f}" for row in found]
        ready = _cell(spread("ready_s", results.starts[peer]), "ready_s") if peer in results.starts else "-"
        lines.append(f"| {peer.system} | {peer.kv_dtype} | {peer.weights} | {ready} | " + " | ".join(cells) + " |")
    return [*lines, "", "Memory is that of the process and its children; pages that they share count for each.", ""]


def label_of(row: dict[str, Any]) -> str:
    """``label`` of a row's engine."""
    return f"{row['system']}:{row['kv_dtype']}:{row['weights']}"


def _cell(row: dict[str, Any] | None, figure: str) -> str:
    if row is None:
        return "-"
    middle, least, most = (row[figure + end] for end in ("", "_min", "_max"))
    digits = 0 if middle >= 100 else 1
    return f"{middle:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"
