"""The example for transformers runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.serving import byte_tokenizer
from helpers.tiny import save, tiny_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "hf_generate.py"


def test_the_example_runs_on_a_model_directory(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=2048)
    path = save(model, tmp_path, byte_tokenizer)
    command = [sys.executable, str(EXAMPLE), path, "--dtype", "int4", "--new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "QuantizedCache(int4, rows=1" in done.stdout
    assert "How long may I keep a book?" in done.stdout
    assert "with drafts: 8 tokens" in done.stdout
