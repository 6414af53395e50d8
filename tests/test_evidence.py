"""The evidence's script on a tiny model: stages, what is kept, tables."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from helpers.serving import CONTEXT, byte_tokenizer
from helpers.tiny import save, tiny_model

from kvbits.errors import ConfigError
from kvbits.evaluation.documents import reference_text

ROOT = Path(__file__).parents[1] / "benchmarks"
WINDOW = 256


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script's stages for one tiny model and small sizes."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("evidence_stages")
    model = tiny_model("llama", head_dim=64, vocab_size=259, max_position_embeddings=CONTEXT)
    folder = save(model, tmp_path / "model", byte_tokenizer)
    small = {
        "SUBJECTS": {"tiny": module.Subject(folder, windows=2, longest=2 * WINDOW, chat=False)},
        "CONTEXT": WINDOW,
        "WRITTEN": WINDOW,
        "FIT_WINDOWS": 2,
        "CHECK_WINDOWS": 1,
        "BUDGETS": (4.6,),
        "FEW": ("int8", "4.6"),
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    yield module
    for name in ("evidence", "evidence_tables"):
        sys.modules.pop(name, None)


def run(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> int:
    script = importlib.import_module("evidence")
    line = ["evidence.py", "--models", data, "--data-dir", data, "--out", out, "--stages", *names]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    code: int = script.main()
    return code


def test_stages_are_kept_and_never_run_again(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    text = reference_text()
    for index, name in enumerate((stages.TEXT, *stages.BOOKS)):
        (data / name).write_text(text[index * 5000 : (index + 1) * 5000])
    names = ("calibrate", "fidelity", "written", "positions", "tools", "retrieval-8k")
    assert run(data, out, monkeypatch, *names) == 0

    rows = json.loads((out / "tiny" / "fidelity.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["int8", "int6", "int4+sink:int8", "int4", "4.6"]
    assert all(row["windows"] == 2 and row["tokens"] == 2 * (WINDOW // 2 - 1) for row in rows)
    losses = [row["kl_mean"] for row in rows]
    assert losses[0] < losses[1] < losses[2] < losses[3]
    assert rows[4]["bits_per_element"] == pytest.approx(4.6, abs=0.2)
    assert losses[4] < losses[3]
    for stage, length in (("positions", 2 * WINDOW), ("written", WINDOW)):
        found = json.loads((out / "tiny" / f"{stage}.json").read_text())["rows"]
        assert [row["dtype"] for row in found] == ["int8", "4.6"]
        assert found[0]["by_position"][0]["begin"] == 0
        assert found[0]["by_position"][-1]["end"] == length
    # no chat template, and too short a context
    assert not (out / "tiny" / "tools.json").exists()
    assert not (out / "tiny" / "retrieval-8k.json").exists()
    tables = (out / "tables.md").read_text()
    assert "## tiny, 2 windows of" in tables
    assert "| `--bits 4.6` |" in tables
    assert (out / "evidence-bits.png").read_bytes().startswith(b"\x89PNG")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(stages, "load_model", never)
    capsys.readouterr()
    assert run(data, out, monkeypatch, *names) == 0
    assert "==" not in capsys.readouterr().err


def test_what_is_missing_is_named_before_anything_is_measured(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(stages, "load_model", never)
    (tmp_path / stages.TEXT).write_text("text")
    with pytest.raises(SystemExit, match=r"there is no moby_dick\.txt in"):
        run(tmp_path, tmp_path / "out", monkeypatch, "fidelity", "calibrate")
    monkeypatch.setattr(stages, "SUBJECTS", {"none": stages.Subject("none.gguf", 1, 512)})
    sys.modules.pop("evidence")
    with pytest.raises(SystemExit, match=r"there is no none\.gguf in"):
        run(tmp_path, tmp_path / "out", monkeypatch, "fidelity")


def test_a_result_that_was_cut_off_is_none(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    one = stages.Run("tiny", stages.SUBJECTS["tiny"], tmp_path, tmp_path, tmp_path / "out" / "tiny", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match="No space left"):
            one.keep("fidelity", {})
    assert not one.result("fidelity").exists()
    # what a kill leaves
    (one.out / ".fidelity.7.part.json").write_text("{")
    (one.out / "llama.tmp.json").write_text("{")
    assert run(tmp_path, tmp_path / "out", monkeypatch, "tools") == 0


def test_a_policy_that_is_not_calibrated_is_named(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / stages.TEXT).write_text(reference_text()[:5000])
    with pytest.raises(SystemExit, match=r"no policy of 4\.6 bits: run the stage 'calibrate' first"):
        run(tmp_path, tmp_path / "out", monkeypatch, "fidelity")
