"""The examples of the quick start, planning, export and report run, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.serving import byte_tokenizer
from helpers.tiny import VOCAB, save, tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_capacity() -> None:
    lines = output("plan_capacity").splitlines()
    assert "65.0 GiB" in lines[0] or "64." in lines[0]
    assert lines[1].split()[:2] == ["bf16:", "131,072"]
    assert "  4 sessions of 131,072 tokens" in lines[1]
    assert "  7 sessions" in lines[2]


def test_traffic() -> None:
    lines = output("plan_traffic").splitlines()
    waits = {line.split("waited")[0].strip(" :"): float(line.split("mean wait")[1].split()[0]) for line in lines}
    assert len(waits) == 6
    assert waits["all different, bf16"] > waits["all different, int4"]
    assert waits["shared prefix, bf16"] < waits["all different, bf16"]


def test_flags() -> None:
    shown = output("export_flags")
    assert "vLLM: --kv-cache-dtype" in shown
    assert "-ctk q8_0 -ctv q4_0" in shown


def words(folder: Path) -> Path:
    """A text that the tiny models' tokenizer knows."""
    text = folder / "words.txt"
    text.write_text(" ".join(f"w{4 + (i * i + i // 7) % (VOCAB - 4)}" for i in range(600)))
    return text


def test_quick_start(tmp_path: Path) -> None:
    model = save(tiny_model("llama", vocab_size=259), tmp_path, byte_tokenizer)
    lines = output("quick_start", model, "--memory", "8MiB", "--new-tokens", 6).splitlines()
    assert [line.split(" ... ")[0] for line in lines[:3]] == [
        "The sky is blue because", "A generator in Python is", "Three rivers of Europe are",
    ]  # fmt: skip
    assert lines[-1].startswith("cache: int4, ")


def test_scales(tmp_path: Path) -> None:
    model = save(tiny_model("llama"), tmp_path / "model")
    arguments = ["--model", model, "--context", 64, "--output", tmp_path / "out", "--per", "head"]
    shown = output("export_scales", words(tmp_path), *arguments)
    assert "compressed-tensors reads: 8 bits, float, per attn_head" in shown
    assert "missing: 0, unexpected: 0" in shown
    assert shown.count("k_scale [") == 3


def test_report(tmp_path: Path) -> None:
    text = words(tmp_path)
    page = tmp_path / "page.html"
    model = save(tiny_model("llama"), tmp_path / "model")
    shown = output("report_page", text, "--model", model, "--context", 256, "--output", page)
    assert "Rule: " in shown
    assert page.read_text().count("plot-") >= 2
