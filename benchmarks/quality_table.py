"""The quality table: what kvbits loses at each number of bits, beside llama.cpp, and what the allocation brings.

    python benchmarks/quality_table.py smollm2-135m --calibrate moby_dick.txt war_and_peace.txt \\
        --text wiki=wiki.test.raw --text agent=agent.txt --windows 16 -o out/quality

One calibration serves every budget of ``--bits``. The first ``--text`` is the table's; on every text each budget of
``--gain`` is compared with the uniform policy of the same bits (that dtype in every layer, first page in int8, rounded
to nearest, and with the calibrated rounding). No text may be one that was calibrated on. Everything that is finished is
kept in the output directory, window by window: the same command goes on where it was stopped. Results: ``quality.json``
and ``quality.md``.

For SmolLM2 on two cores: calibration 4 minutes, 7 s a policy and window (16 windows of two texts: 45 minutes),
llama.cpp 12 minutes. ``--no-llama`` leaves it out; it needs ``benchmarks/peers/install.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from report import Row, facts_of, note, publish

from kvbits.calibration.policy import Planner
from kvbits.calibration.run import planner_of
from kvbits.calibration.texts import split_windows
from kvbits.cli.session import Bar, tokens_of
from kvbits.codecs import SCHEMES, LayerRounding, Policy, PoolLayout
from kvbits.codecs.policy_file import save_policy
from kvbits.config import POLICY_PREFIX
from kvbits.evaluation.laboratory import Laboratory
from kvbits.evaluation.resume import ResumeCache
from kvbits.evaluation.windows import cut_windows, read_text
from kvbits.models import LoadedModel, load_model

CACHES = ("q8_0/q8_0", "q8_0/q4_0", "q5_1/q5_1", "q4_0/q4_0")
UNIFORM = {4.5: "int4", 3.5: "int3", 5.5: "int5", 2.5: "int2"}
"""The dtype that has so many bits in every layer of a model with heads of 64."""


def main() -> None:
    args = _arguments()
    out: Path = args.output
    loaded = load_model(args.model, dtype="float32", progress=note)
    policies = _policies(args, loaded, out / "policies")
    resume_cache = ResumeCache(out / "parts.jsonl")
    rows: list[Row] = []
    for index, (name, path) in enumerate(args.text):
        laboratory = Laboratory(loaded, [p for p in policies if index == 0 or "gain" in p.label], resume_cache, Bar)
        laboratory.text(cut_windows(tokens_of(loaded, read_text(path)), args.context, args.windows))
        rows += [_row(loaded, name, policy, laboratory) for policy in laboratory.policies]
    gains = _gains(rows, args.gain)
    llama = [] if args.no_llama else _llama(args, out / "llama.json")
    facts = facts_of(args, "output", "text", "calibrate") | {"text": {name: path.name for name, path in args.text}}
    notes = (
        f"Text {args.text[0][1].name}, {args.windows} windows of {args.context} tokens, second half scored; calibrated "
        f"on {', '.join(path.name for path in args.calibrate)}, {args.fit_windows} windows. llama.cpp against its own "
        "16-bit cache."
    )
    shown = {
        "rows": _shown([r for r in rows if r["text"] == args.text[0][0]], llama),
        "what the allocation brings": gains,
    }
    tables = {"rows": rows, "gain": gains, "llama_cpp": llama}
    publish(f"Quality of {args.model}", tables, facts, out / "quality.json", notes=notes, shown=shown)


def _policies(args: argparse.Namespace, loaded: LoadedModel, directory: Path) -> list[Policy]:
    """The policies, labelled by what they are; calibrates what is not on disk yet."""
    names = [f"calibrated-{b:g}" for b in args.bits]
    for b in args.gain:
        names += [f"gain-{b:g}-allocated", f"gain-{b:g}-uniform"]
    found = [loaded.policy(f"{UNIFORM[b]}+sink:int8") for b in args.gain]
    found = [replace(p, label=f"gain-{b:g}-plain") for p, b in zip(found, args.gain, strict=True)]
    planner: Planner | None = None
    for name in names:
        if not (directory / name / "policy.json").exists():
            planner = planner or _planner(args, loaded)
            budget = planner.of_bits(float(name.split("-")[1]))
            policy, predicted = planner.policy(budget), planner.predicted(budget)
            if name.endswith("uniform"):
                policy, predicted = _uniform(planner, UNIFORM[float(name.split("-")[1])], policy)
            facts = {"texts": [p.name for p in args.calibrate], "predicted_kl": predicted}
            save_policy(directory / name, policy, loaded.geometry, loaded.fingerprint, facts)
        found.append(replace(loaded.policy(f"{POLICY_PREFIX}{directory / name}"), label=name))
    return found


def _planner(args: argparse.Namespace, loaded: LoadedModel) -> Planner:
    texts = [tokens_of(loaded, read_text(path)) for path in args.calibrate]
    windows, _ = split_windows(texts, args.context, args.fit_windows, 1)
    return planner_of(loaded, windows, "int8", Bar)


def _uniform(planner: Planner, name: str, like: Policy) -> tuple[Policy, float]:
    """``name`` everywhere with the calibrated rounding, and the KL that is predicted for it."""
    picked = [next(c for c in row if c.name == name) for row in planner.table]
    pairs = list(zip(picked[::2], picked[1::2], strict=True))
    rounding = tuple(LayerRounding(k.rounding, v.rounding) for k, v in pairs)
    return replace(like, layers=(SCHEMES[name],) * len(pairs), rounding=rounding), sum(c.cost for c in picked)


def _row(loaded: LoadedModel, text: str, policy: Policy, laboratory: Laboratory) -> Row:
    found, layout = laboratory.fidelity[policy.label], PoolLayout.of(loaded.geometry, policy)
    sizes = {f"effective_bits_{tokens}": layout.effective_bits(tokens) for tokens in (2048, 8192)}
    row = {"text": text, "policy": policy.label, "bits": found.bits_per_element, **sizes, "windows": found.windows}
    return row | asdict(found.summary)


def _gains(rows: list[Row], budgets: list[float]) -> list[Row]:
    """KL of the allocated policy against the uniform ones of the same bits, text by text."""
    kl = {(r["text"], r["policy"]): r["kl_mean"] for r in rows}
    found = []
    for text in dict.fromkeys(r["text"] for r in rows):
        for b in budgets:
            ours, calibrated, plain = (kl[text, f"gain-{b:g}-{k}"] for k in ("allocated", "uniform", "plain"))
            found.append(
                {
                    "text": text,
                    "bits": b,
                    "KL allocated": ours,
                    "KL uniform": calibrated,
                    "KL uniform, to nearest": plain,
                    "less than uniform": f"{100 * (1 - ours / calibrated):.0f} %",
                    "less than to nearest": f"{100 * (1 - ours / plain):.0f} %",
                }
            )
    return found


def _llama(args: argparse.Namespace, path: Path) -> list[Row]:
    if not path.exists():
        script = Path(__file__).with_name("quality_peers.py")
        line = [sys.executable, str(script), "--text", str(args.text[0][1]), "--json", str(path)]
        line += ["--context", str(args.context), "--windows", str(args.windows), "--caches", *CACHES]
        subprocess.run(line, check=True)
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return rows


def _shown(rows: list[Row], llama: list[Row]) -> list[Row]:
    """The table's columns."""
    return [
        _columns(f"kvbits {r['policy']}", r["bits"], r["effective_bits_2048"], r["effective_bits_8192"], r,
                 r["perplexity_16bit"], 100 * r["top1_agreement"])
        for r in rows
    ] + [
        _columns(f"llama.cpp {r['key']}/{r['value']}", *3 * (r["bits_per_element"],), r, r["perplexity_base"],
                 r["same_top_percent"])
        for r in llama
    ]  # fmt: skip


def _columns(cache: str, bits: float, at_2k: float, at_8k: float, row: Row, base: float, same: float) -> Row:
    return {
        "cache": cache,
        "bits": f"{bits:.2f}",
        "all bits, 2K": f"{at_2k:.2f}",
        "8K": f"{at_8k:.2f}",
        "KL mean": f"{row['kl_mean']:.5f}",
        "KL 99 %": f"{row['kl_p99']:.4f}",
        "perplexity": f"{100 * (row['perplexity'] / base - 1):+.2f} %",
        "same top token": f"{same:.1f} %",
    }


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FILE of an existing file")
    return name, Path(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--text", type=_named, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--bits", type=float, nargs="*", default=[8.25, 6.5, 4.6, 3.6, 3.1, 2.6])
    parser.add_argument("--gain", type=float, nargs="*", choices=sorted(UNIFORM), default=[4.5, 3.5])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--fit-windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--no-llama", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    main()
