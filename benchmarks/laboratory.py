"""The whole laboratory on one model, in parts that can be stopped: the tables and pictures of docs/results.md.

    python benchmarks/laboratory.py --data-dir DATA --out out/laboratory --limit 3600

``DATA`` holds the published files (wiki.test.raw, moby_dick.txt, kv-retrieval-75_keys.jsonl.gz,
longchat_lines_200.jsonl, qa1 and qa2 of bAbI, BFCL's simple questions, gsm8k_test.jsonl) at any depth. What is finished
is kept in ``out/laboratory/parts.jsonl``: run it again to go on. The report is written when everything is done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from limit import OutOfTime, time_limit
from report import note, write

from kvbits.cli.session import Bar, machine, tokens_of
from kvbits.evaluation.compare import policies_of
from kvbits.evaluation.laboratory import Laboratory
from kvbits.evaluation.pictures import draw_all
from kvbits.evaluation.report import write_report
from kvbits.evaluation.resume import ResumeCache
from kvbits.evaluation.selection import Sizes, choose, document, run_tasks, self_check
from kvbits.evaluation.windows import read_text
from kvbits.models import load_model


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with time_limit(args.limit):
            run(args)
    except OutOfTime:
        print("stopped before it was done; run the same again to go on")
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    text, book = find(args.data_dir, args.text), find(args.data_dir, args.book)
    selection = choose(args.tasks, True, args.data_dir)
    sizes = Sizes(
        args.context, args.windows, args.task_context, args.depths, args.samples, args.texts, args.new_tokens,
        args.tool_questions, args.problems, all_positions=True,
    )  # fmt: skip
    resume_cache = ResumeCache(args.out / "parts.jsonl")
    loaded = load_model(args.model, dtype="float32", progress=note)
    served = load_model(args.model, progress=note)
    policies = policies_of(loaded, args.dtypes, args.context)
    laboratory = Laboratory(loaded, policies, resume_cache, Bar, served=served, served_dtype="bfloat16")
    tokens = tokens_of(loaded, read_text(text))
    run_tasks(laboratory, selection, tokens, read_text(book), sizes)
    rows = laboratory.results() + self_check(laboratory, selection, tokens, sizes)
    found = document(laboratory, rows, sizes, text, machine())
    write(args.out / "laboratory.json", found)
    write_report(args.out / "laboratory.html", found)
    for name, figure in draw_all(rows).items():
        figure.savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


def find(folder: Path, name: str) -> Path:
    found = min(folder.rglob(name), default=None)
    if found is None:
        raise SystemExit(f"there is no {name} in {folder}")
    return found


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
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1e6, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
