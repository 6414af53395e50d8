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
from pathlib import Path

from kvbits.evaluation.pictures import draw_all


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "laboratory.json"
    command = [
        str(Path(sys.executable).with_name("kvbits")), "evaluate", args.model, "--tasks", args.tasks,
        "--all-positions", "--self-check",
        "--text", find(args.data_dir, args.text), "--haystack", find(args.data_dir, args.book),
        "--data-dir", str(args.data_dir), "--resume", str(args.out / "parts.jsonl"),
        "--context", str(args.context), "--windows", str(args.windows), "--task-context", str(args.task_context),
        "--samples", str(args.samples), "--depths", str(args.depths), "--texts", str(args.texts),
        "--new-tokens", str(args.new_tokens), "--tool-questions", str(args.tool_questions),
        "--json", str(report), "--html", str(args.out / "laboratory.html"),
    ]  # fmt: skip
    for dtype in args.dtypes:
        command += ["--kv-policy", dtype[7:]] if dtype.startswith("policy:") else ["--kv-cache-dtype", dtype]
    try:
        subprocess.run(command, timeout=args.limit, check=True)
    except subprocess.TimeoutExpired:
        print("stopped before it was done; run the same again to go on")
        return 1
    for name, figure in draw_all(json.loads(report.read_text())["results"]).items():
        figure.savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")
    return 0


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
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--text", default="wiki.test.raw")
    parser.add_argument("--book", default="moby_dick.txt")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a window of the text")
    parser.add_argument("--task-context", type=int, default=8192, help="tokens of the longest question")
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
