"""One page from results of your own: here two dtypes are evaluated on a small text, a memory is planned, and joined.

python examples/report_page.py TEXT              # writes report.html
python examples/report_page.py TEXT --model DIR --output page.html
"""

import argparse
import sys
import tempfile
from pathlib import Path

from kvbits.cli.main import run


def kvbits(*arguments: object) -> None:
    """The command line, in this process."""
    try:
        run([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)


def main() -> None:
    """Evaluate, plan, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    args = parser.parse_args()
    dtypes = [word for dtype in ("bf16", "int8", "int4") for word in ("--kv-cache-dtype", dtype)]
    with tempfile.TemporaryDirectory() as folder:
        quality, capacity = Path(folder, "evaluate.json"), Path(folder, "plan.json")
        kvbits("evaluate", args.model, "--text", args.text, "--window", args.context, "--windows", 1, *dtypes,
               "--json", quality)  # fmt: skip
        kvbits("plan", args.model, "--memory", "1GiB", "--context", args.context, *dtypes, "--json", capacity)
        kvbits("report", quality, capacity, "--sessions", 4, "--output", args.output)


if __name__ == "__main__":
    main()
