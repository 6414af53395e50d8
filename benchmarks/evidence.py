"""What caches of few bits cost on real models, measured in every way that docs/evidence.md shows.

    python benchmarks/evidence.py --models MODELS --data-dir DATA --out out/evidence --limit 3600

``MODELS`` holds the GGUF files of :data:`evidence_stages.SUBJECTS` (SmolLM2 is found by its name), ``DATA`` the
published files (wiki.test.raw, moby_dick.txt, war_and_peace.txt, BFCL's simple questions with ``possible_answer/``,
gsm8k_test.jsonl) at any depth. Stages run one after another, each on every model that it fits; ``--stages`` and
``--subjects`` choose. What is finished is kept, windows and documents of a stage as well: the same command goes on
where it was stopped or killed. The stages that begin with ``llama`` need llama.cpp's own tool
(``benchmarks/peers/install.py``). Ends with the tables and pictures of all that is there (``--tables``: only these).

About four hours on two cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evidence_stages import STAGES, SUBJECTS, Run
from evidence_tables import write_tables
from limit import OutOfTime, time_limit
from peers.install import DEFAULT_DIRECTORY
from report import note


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(name, SUBJECTS[name], args.models, args.data_dir, args.out / name, args.peers) for name in args.subjects
    ]
    left = [
        (stage, run)
        for stage in (args.stages if not args.tables else ())
        for run in runs
        if STAGES[stage].fits(run.subject) and not run.result(stage).exists()
    ]
    for stage, run in left:
        STAGES[stage].check(run)
    done = True
    try:
        with time_limit(args.limit):
            for stage, run in left:
                note(f"== {stage} of {run.name}")
                run.keep(stage, STAGES[stage].measure(run))
    except OutOfTime:
        print("stopped before it was done; run the same again to go on")
        done = False
    write_tables(args.out)
    return 0 if done else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory of the GGUF files")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="MODEL")
    parser.add_argument("--peers", type=Path, default=DEFAULT_DIRECTORY, help="where install.py put llama.cpp")
    parser.add_argument("--tables", action="store_true", help="only write the tables and pictures of what is there")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
