"""Run lm-evaluation-harness on a quantized cache, with a task made of local files.

    python examples/lm_eval_local.py                       # smollm2-135m, 16 bit beside int4
    python examples/lm_eval_local.py MODEL --dtype int8

It writes a task (a YAML file and its questions) to a folder and runs the harness's own command on it:

    lm_eval --model kvbits --model_args pretrained=smollm2-135m,kv_cache_dtype=int4 --tasks FOLDER/capitals.yaml

The last line of the task file is what makes the harness know kvbits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Greece": "Athens",
    "Egypt": "Cairo", "Austria": "Vienna", "Portugal": "Lisbon", "Russia": "Moscow", "China": "Beijing",
    "Cuba": "Havana",
}  # fmt: skip

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
process_docs: !function kvbits.lm_eval.task.unchanged
"""


def write_task(folder: Path) -> Path:
    """Four choices for each country; returns the task's file."""
    names = list(CAPITALS.values())
    lines = []
    for at, (country, capital) in enumerate(CAPITALS.items()):
        choices = [names[(at + shift) % len(names)] for shift in (0, 3, 5, 7)]
        lines.append(json.dumps({"country": country, "choices": choices, "answer": choices.index(capital)}))
    data = folder / "capitals.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    task = folder / "capitals.yaml"
    task.write_text(TASK.format(data=data, cache=folder / "cache"), encoding="utf-8")
    return task


def main() -> int:
    """Write the task, and run the harness on it once for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int4"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = write_task(Path(folder))
        for dtype in options.dtype:
            arguments = f"pretrained={options.model},kv_cache_dtype={dtype},kv_cache_memory=64MiB"
            # "python -m lm_eval" is what the lm_eval command runs
            command = [sys.executable, "-m", "lm_eval", "--model", "kvbits", "--model_args", arguments]
            code = subprocess.call([*command, "--tasks", str(task)])
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
