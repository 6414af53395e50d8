"""What llama.cpp's quantized caches cost in quality, beside ``kvbits evaluate``.

    python benchmarks/quality_peers.py --text wiki.test.raw --json out/quality_peers.json

With F16 weights (llama.cpp quantizes the activations of 4-bit weights, which adds noise of its own),
``llama-perplexity --kl-divergence`` against llama.cpp's own f16 cache: windows of ``--context`` tokens, the second half
of each is scored. The logits of the f16 run need about 100 KB a scored token for SmolLM2's vocabulary, in ``--scratch``
while it runs.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from peers.install import DEFAULT_DIRECTORY, Installation
from peers.llama_cpp import f16_weights
from peers.model import packaged_gguf
from peers.repack import repack_flags
from report import Row, facts_of, plain_parser, publish

BITS = {"f16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}
"""Bits per element of llama.cpp's block formats: 32 elements and their 16-bit scale (and minimum, for the _1 kinds)."""

CACHES = ("q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0")

_NUMBER = r"\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)"
_FIGURES = {
    "perplexity": rf"^Mean PPL\(Q\)\s*:{_NUMBER}",
    "kl_mean": rf"^Mean\s+KLD\s*:{_NUMBER}",
    "kl_p99": rf"^99\.0%\s+KLD\s*:{_NUMBER}",
    "kl_max": rf"^Maximum KLD\s*:{_NUMBER}",
    "same_top_percent": rf"^Same top p\s*:{_NUMBER}",
}
_BASE = {"perplexity_base": rf"Final estimate: PPL\s*={_NUMBER}"}
"""From the f16 run itself: the "PPL(base)" of the other runs is of stored logits, which are cut off at the low end."""


def parse(output: str, figures: dict[str, str]) -> dict[str, float]:
    """``figures`` (name -> pattern) in what ``llama-perplexity`` wrote. Raises ``ValueError`` when one is missing."""
    found = {}
    for name, pattern in figures.items():
        match = re.search(pattern, output, re.MULTILINE)
        if match is None:
            raise ValueError(f"no {name} in the output of llama-perplexity:\n{output[-1500:]}")
        found[name] = float(match[1])
    return found


def command(args: argparse.Namespace, caches: str, base: Path, compare: bool) -> list[str]:
    """Command line for ``caches``, keys/values: writes its logits to ``base``, or compares its own with them."""
    key, value = caches.split("/")
    options = {
        "-m": args.gguf,
        "-f": args.text,
        "-c": args.context,
        "-b": args.context,
        "--chunks": args.windows,
        "-t": args.threads,
        "-fa": "on",
        "-ctk": key,
        "-ctv": value,
        "--kl-divergence-base": base,
    }
    tool = Installation(args.directory.resolve()).llama_tool("llama-perplexity")
    flags = [str(part) for option in options.items() for part in option]
    return [str(tool), *flags, *(["--kl-divergence"] if compare else []), *repack_flags(args.gguf)]


def run(line: list[str]) -> str:
    """Standard output and error of the command. Raises ``RuntimeError`` when it fails."""
    print("+", shlex.join(line), flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"status {done.returncode} of {shlex.join(line)}\n{done.stdout[-1500:]}")
    return done.stdout


def evaluate(args: argparse.Namespace) -> list[Row]:
    """A row for each pair of caches."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        base = Path(scratch, "base.kld")
        unquantized = parse(run(command(args, "f16/f16", base, compare=False)), _BASE)
        for caches in args.caches:
            key, value = caches.split("/")
            line = command(args, caches, base, compare=True)
            row: Row = {"system": "llama.cpp", "key": key, "value": value}
            row["bits_per_element"] = (BITS[key] + BITS[value]) / 2
            rows.append(row | unquantized | parse(run(line), _FIGURES) | {"command": shlex.join(line)})
    return rows


def shown(rows: list[Row]) -> list[Row]:
    """The table's columns."""
    return [
        {
            "keys / values": f"{row['key']} / {row['value']}",
            "bits per element": row["bits_per_element"],
            "perplexity": f"{100 * (row['perplexity'] / row['perplexity_base'] - 1):+.2f} %",
            "mean KL": f"{row['kl_mean']:.5f}",
            "99 % KL": f"{row['kl_p99']:.4f}",
            "same top token": f"{row['same_top_percent']:.1f} %",
        }
        for row in rows
    ]


def pair(text: str) -> str:
    """``q8_0/q4_0``, checked."""
    if len(text.split("/")) != 2 or not all(part in BITS for part in text.split("/")):
        raise argparse.ArgumentTypeError(f"'{text}' is not KEYS/VALUES out of {', '.join(BITS)}, for example q8_0/q4_0")
    return text


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="raw text file, for example WikiText-2's test set")
    parser.add_argument("--caches", nargs="+", type=pair, default=list(CACHES), metavar="KEYS/VALUES")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gguf", type=Path, default=packaged_gguf())
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="where install.py put llama.cpp")
    parser.add_argument("--scratch", type=Path, help="where the f16 logits lie meanwhile; default: the system's")
    args = parser.parse_args()
    for file in (args.text, args.gguf):
        if file is None or not file.is_file():
            parser.error(f"the file '{file}' does not exist")
    model = args.gguf.name
    args.gguf = f16_weights(Installation(args.directory.resolve()), args.gguf)
    rows = evaluate(args)
    facts = facts_of(args, "directory", "scratch", "caches") | {"gguf": model}
    notes = f"llama.cpp with F16 weights against its own f16 cache, perplexity {rows[0]['perplexity_base']:.3f}"
    publish("llama.cpp's caches", {"rows": rows}, facts, args.json, notes=notes, shown={"rows": shown(rows)})


if __name__ == "__main__":
    main()
