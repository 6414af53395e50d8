"""The whole laboratory on one model, in parts that can be stopped: the tables and pictures of docs/laboratory.md.

    python benchmarks/laboratory.py --data-dir DATA --out out/laboratory --limit 3600

``DATA`` holds the published files (wiki.test.raw, moby_dick.txt, kv-retrieval-75_keys.jsonl.gz,
longchat_lines_200.jsonl, qa1 and qa2 of bAbI, BFCL's simple questions) at any depth. What is finished is kept in
``out/laboratory/parts.jsonl``: run it again to go on. The report is written when everything is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from kvbits.evaluation.pictures import draw_all

PARTS = (
    "fidelity",
    "layers",
    "needle",
    "tools",
    "kv-retrieval",
    "lines",
    "multikey",
    "variables",
    "babi",
    "generation",
    "passkey",
)


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.limit
    # Part by part first: a stop then loses one part of one dtype at most. The last run finds all of them done.
    for tasks in (*(args.parts.split(",") if args.parts else PARTS), "all"):
        if tasks == "all" and args.parts:
            break
        left = end - time.monotonic()
        if left <= 0 or not run(args, tasks, left):
            print(f"stopped before {tasks} was done; run the same again to go on")
            return 1
    if not args.parts:
        results = json.loads((args.out / "laboratory.json").read_text())["results"]
        for name, figure in draw_all(results).items():
            figure.savefig(args.out / f"{name}.png", dpi=110)
            print(args.out / f"{name}.png")
    return 0


def run(args: argparse.Namespace, tasks: str, seconds: float) -> bool:
    """Whether ``kvbits evaluate`` ended well within ``seconds``."""
    command = [
        str(Path(sys.executable).with_name("kvbits")), "evaluate", args.model, "--tasks", tasks, "--all-positions",
        "--text", find(args.data_dir, args.text), "--haystack", find(args.data_dir, args.book),
        "--data-dir", str(args.data_dir), "--resume", str(args.out / "parts.jsonl"),
        "--context", str(args.context), "--windows", str(args.windows), "--samples", str(args.samples),
        "--depths", str(args.depths), "--texts", str(args.texts), "--new-tokens", str(args.new_tokens),
        "--tool-questions", str(args.tool_questions),
    ]  # fmt: skip
    for dtype in args.dtypes:
        command += ["--kv-policy", dtype[7:]] if dtype.startswith("policy:") else ["--kv-cache-dtype", dtype]
    if tasks in ("all", "fidelity"):
        command += ["--self-check"]
    if tasks == "all":
        command += ["--json", str(args.out / "laboratory.json"), "--html", str(args.out / "laboratory.html")]
    print(f"== {tasks}", flush=True)
    try:
        return subprocess.run(command, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def find(folder: Path, name: str) -> str:
    found = min(folder.rglob(name), default=None)
    if found is None:
        raise SystemExit(f"there is no {name} in {folder}")
    return str(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/laboratory"))
    parser.add_argument("--dtypes", nargs="+", default=["int8", "int4", "int3", "int2"], help="policy:DIR for a policy")
    parser.add_argument("--parts", default="", help="only these, with commas between; no report")
    parser.add_argument("--text", default="wiki.test.raw")
    parser.add_argument("--book", default="moby_dick.txt")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument("--tool-questions", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
