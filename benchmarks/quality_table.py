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
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from machine import describe, machine_facts
from report import table

from kvbits.calibration.collect import collect
from kvbits.calibration.fit import Choice, fit
from kvbits.calibration.policy import Planner, candidates
from kvbits.calibration.texts import split_windows
from kvbits.codecs import SCHEMES, LayerRounding, Policy, PoolLayout, Scheme
from kvbits.codecs.artifact import resolve_policy, save_policy
from kvbits.evaluation.compare import SideBySide, policy_name
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.windows import cut_windows, read_text
from kvbits.models import LoadedModel, load_model

CACHES = ("q8_0/q8_0", "q8_0/q4_0", "q5_1/q5_1", "q4_0/q4_0")
UNIFORM = {4.5: "int4", 3.5: "int3", 5.5: "int5", 2.5: "int2"}
"""The dtype that has so many bits in every layer of a model with heads of 64."""


def main() -> None:
    args = _arguments()
    out: Path = args.output
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(args.model, dtype="float32", progress=_say)
    policies = _policies(args, loaded, out / "policies")
    rows: list[dict[str, Any]] = []
    for index, (name, path) in enumerate(args.text):
        wanted = {k: v for k, v in policies.items() if index == 0 or "gain" in k}
        rows += _evaluate(args, loaded, wanted, name, path, out / "windows")
    settings = {k: getattr(args, k) for k in ("model", "windows", "fit_windows", "context", "bits", "gain")}
    settings["text"] = {name: path.name for name, path in args.text}
    settings["calibrate"] = [path.name for path in args.calibrate]
    result = {
        "machine": machine_facts(),
        "settings": settings,
        "rows": rows,
        "gain": _gains(rows, args.gain),
        "llama_cpp": [] if args.no_llama else _llama(args, out / "llama.json"),
    }
    (out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    text = _markdown(result)
    (out / "quality.md").write_text(text)
    print(text)


def _policies(args: argparse.Namespace, loaded: LoadedModel, directory: Path) -> dict[str, str]:
    """Dtype strings by label; calibrates what is not on disk yet."""
    names = [f"calibrated-{b:g}" for b in args.bits]
    for b in args.gain:
        names += [f"gain-{b:g}-allocated", f"gain-{b:g}-uniform"]
    if not all((directory / name / "policy.json").exists() for name in names):
        begin = time.perf_counter()
        tokens = [list(loaded.tokenizer(read_text(p), add_special_tokens=False)["input_ids"]) for p in args.calibrate]
        windows, _ = split_windows(tokens, args.context, args.fit_windows, 1)
        _say(f"calibrating on {len(windows)} windows")
        statistics = collect(loaded, windows, progress=lambda n: _say("  one window done"))
        choices = fit(statistics, candidates(loaded.geometry))
        planner = Planner(loaded.geometry, choices, "int8")
        facts = {"texts": [p.name for p in args.calibrate], "seconds": time.perf_counter() - begin}
        for name in names:
            bits = float(name.split("-")[1])
            budget = planner.of_bits(bits)
            policy, predicted = planner.policy(budget), planner.predicted(budget)
            if name.endswith("uniform"):
                policy, predicted = _uniform(choices, UNIFORM[bits], policy)
            save_policy(
                directory / name, policy, loaded.geometry, loaded.fingerprint, facts | {"predicted_kl": predicted}
            )
    found = {name: f"policy:{directory / name}" for name in names}
    return found | {f"gain-{b:g}-plain": f"{UNIFORM[b]}+sink:int8" for b in args.gain}


def _uniform(choices: list[list[Choice]], name: str, like: Policy) -> tuple[Policy, float]:
    """``name`` everywhere with the calibrated rounding, and the KL that is predicted for it."""
    picked = [next(c for c in row if c.name == name) for row in choices]
    pairs = list(zip(picked[::2], picked[1::2], strict=True))
    layers = tuple(Scheme(SCHEMES[name].key, SCHEMES[name].value) for _ in pairs)
    rounding = tuple(LayerRounding(k.rounding, v.rounding) for k, v in pairs)
    return replace(like, layers=layers, rounding=rounding), sum(c.cost for c in picked)


def _evaluate(
    args: argparse.Namespace, loaded: LoadedModel, policies: dict[str, str], name: str, path: Path, cache: Path
) -> list[dict[str, Any]]:
    tokens = list(loaded.tokenizer(read_text(path), add_special_tokens=False)["input_ids"])
    windows = cut_windows(tokens, args.context, args.windows)
    records = {label: Fidelity() for label in policies}
    engines = None
    for index, window in enumerate(windows):
        file = cache / f"{name}-{args.context}-{index}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        names = {label: policy_name(loaded, dtype) for label, dtype in policies.items()}
        if known.get("policies") != names:
            engines = engines or SideBySide(loaded, list(policies.values()), args.context)
            begin = time.perf_counter()
            found = engines.run(window, args.context // 2)
            known = {"policies": names, "records": {label: found[d].as_json() for label, d in policies.items()}}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known))
            _say(f"{name}: window {index + 1} of {len(windows)}, {time.perf_counter() - begin:.0f} s")
        for label, record in records.items():
            record.extend(Fidelity.from_json(known["records"][label]))
    return [
        {"text": name, "policy": label, **_sizes(loaded, policies[label]), "windows": len(windows)}
        | asdict(record.summary())
        for label, record in records.items()
    ]


def _sizes(loaded: LoadedModel, dtype: str) -> dict[str, float]:
    policy = resolve_policy(dtype, loaded.geometry, loaded.fingerprint)
    layout = PoolLayout.of(loaded.geometry, policy)
    elements = loaded.geometry.bytes_per_token_16bit() / 2
    sizes = {"bits": policy.bits_per_element(loaded.geometry)}
    for tokens in (2048, 8192):
        held = layout.frames_of(tokens) * layout.frame_bytes
        sizes[f"effective_bits_{tokens}"] = 8 * held / (tokens * elements)
    return sizes


def _gains(rows: list[dict[str, Any]], budgets: list[float]) -> list[dict[str, Any]]:
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


def _llama(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        script = Path(__file__).with_name("quality_peers.py")
        line = [sys.executable, str(script), "--text", str(args.text[0][1]), "--json", str(path)]
        line += ["--context", str(args.context), "--windows", str(args.windows), "--caches", *CACHES]
        subprocess.run(line, check=True)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def _markdown(result: dict[str, Any]) -> str:
    main_text = result["rows"][0]["text"]
    rows = [
        {
            "cache": f"kvbits {r['policy']}",
            "bits": f"{r['bits']:.2f}",
            "all bits, 2K": f"{r['effective_bits_2048']:.2f}",
            "8K": f"{r['effective_bits_8192']:.2f}",
            "KL mean": f"{r['kl_mean']:.5f}",
            "KL 99 %": f"{r['kl_p99']:.4f}",
            "perplexity": f"{100 * (r['perplexity'] / r['perplexity_16bit'] - 1):+.2f} %",
            "same top token": f"{100 * r['top1_agreement']:.1f} %",
        }
        for r in result["rows"]
        if r["text"] == main_text
    ]
    rows += [
        {
            "cache": f"llama.cpp {r['key']}/{r['value']}",
            "bits": f"{r['bits_per_element']:.2f}",
            "all bits, 2K": f"{r['bits_per_element']:.2f}",
            "8K": f"{r['bits_per_element']:.2f}",
            "KL mean": f"{r['kl_mean']:.5f}",
            "KL 99 %": f"{r['kl_p99']:.4f}",
            "perplexity": f"{100 * (r['perplexity'] / r['perplexity_base'] - 1):+.2f} %",
            "same top token": f"{r['same_top_percent']:.1f} %",
        }
        for r in result["llama_cpp"]
    ]
    settings = result["settings"]
    lines = [
        f"# Quality of {settings['model']}",
        f"{describe(result['machine'])}",
        f"Text {main_text} ({settings['text'][main_text]}), {settings['windows']} windows of {settings['context']} "
        f"tokens, second half scored; calibrated on {', '.join(settings['calibrate'])}, {settings['fit_windows']} "
        "windows. llama.cpp against its own 16-bit cache.",
        table(rows),
        "## What the allocation brings",
        table(result["gain"]) if result["gain"] else "",
    ]
    return "\n\n".join(lines) + "\n"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
