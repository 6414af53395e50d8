"""Every command on a hybrid saved to a directory, as from the shell: it works, or one line says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.command import complaint, status
from helpers.tiny import VOCAB, chat_tokenizer, save, tiny_config, tiny_model
from helpers.tiny_engine import one_thread

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.export.flags import translate
from kvbits.models import geometry_of
from kvbits.planning.core import plan

__all__ = ["one_thread"]

MEMORY = ("--kv-cache-memory", "8MiB")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_model("bamba"), tmp_path_factory.mktemp("hybrid"), chat_tokenizer)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the tiny tokenizer, a paragraph every 40."""
    words = torch.randint(4, VOCAB, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = (" ".join(f"w{word}" for word in words[at : at + 40]) for at in range(0, len(words), 40))
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("\n\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(path: Path, *arguments: object) -> dict:
    """The results of a command that works."""
    assert status(*arguments, "--json", path) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_dtype_that_chooses_itself(hybrid: str, book: Path, tmp_path: Path) -> None:
    """``auto`` measures the hybrid on a text, and a second start with a named dtype knows what was found."""
    asked = ("generate", hybrid, "-p", "w5 w6", "--max-tokens", 4, *MEMORY)
    found = written(tmp_path / "a.json", *asked, "--text", book, "--max-kl", 0.05, "--chat")
    assert found["loss"]["kl"] <= 0.05
    assert found["dtype"] != "bf16"
    assert len(found["results"][0]["token_ids"]) <= 4
    rounded = written(tmp_path / "b.json", *asked, "--kv-cache-dtype", "int8", "--state-dtype", "bfloat16")
    assert rounded["results"][0]["error"] is None


def test_measuring_commands(hybrid: str, book: Path, tmp_path: Path) -> None:
    dtype = ("--kv-cache-dtype", "int8")
    sizes = ("--windows", 1, "--window", 128, "--text", book)
    loss = written(tmp_path / "a.json", "evaluate", hybrid, *dtype, *sizes, "--tasks", "fidelity,layers")
    row = loss["results"][0] if "results" in loss else loss
    assert 0 <= row["kl_mean"] < 1e-2
    speed = ("--context", 128, "--batch", 2, "--new-tokens", 4, "--text", book)
    plain, rounded = (
        written(tmp_path / "b.json", "bench", hybrid, *dtype, *speed, "--state-dtype", state)["kv_bytes_per_session"]
        for state in ("auto", "bfloat16")
    )
    assert plain - rounded == 2 * 8 * 16 * 16 * 2, "two layers' states, two bytes an element less"
    made = written(tmp_path / "c.json", "plan", hybrid, "--memory", "9MiB", *dtype, "--context", 128)
    assert made["state_bytes"] == 2 * (192 * 4 * 2 + 8 * 16 * 16 * 4)


def test_what_rounded_states_lose_is_measured(
    hybrid: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and beside a dtype's loss, in every part; nothing of it is remembered as the cache dtype's loss."""
    asked = ("evaluate", hybrid, "--kv-cache-dtype", "bf16", "--kv-cache-dtype", "int8", "--text", book)
    sizes = ("--windows", 1, "--window", 160, "--texts", 1, "--new-tokens", 8, "--task-dtype", "float32")
    states = ("--state-dtype", "bfloat16", "--html", tmp_path / "a.html", "--resume", tmp_path / "parts.jsonl")
    parts = ("--tasks", "fidelity,layers,generation")
    alone, beside = written(tmp_path / "a.json", *asked, *sizes, *parts, *states)["results"]
    plain, coded = written(tmp_path / "b.json", *asked, *sizes, *parts, "--resume", tmp_path / "parts.jsonl")["results"]
    assert [row["dtype"] for row in (alone, beside)] == ["bf16, states in bfloat16", "int8, states in bfloat16"]
    assert {row.get("state_dtype") for row in (alone, beside)} == {"bfloat16"}
    assert plain["kl_mean"] == 0 < alone["kl_mean"] < beside["kl_mean"]
    assert coded["kl_mean"] != beside["kl_mean"]
    assert "state_dtype" not in coded
    assert "by_layer" not in alone
    assert beside["by_layer"] == coded["by_layer"], "attention has no states"
    assert alone["generation"]["greedy"]["texts"] == 1
    assert "recurrent states: bfloat16" in (tmp_path / "a.html").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert "bf16, states in bfloat16" in shown
    (kept,) = [json.loads(file.read_text()) for file in (tmp_path / "cache").rglob("losses/*/*.json")]
    assert [loss["kl"] for loss in kept["losses"]] == [coded["kl_mean"]]

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("kvbits.models.load_model", unexpected)
    layers = complaint(capsys, *asked, *sizes, "--tasks", "layers", "--state-dtype", "bfloat16")
    assert "the part 'layers' measures attention, which has no states" in layers
    llama = save(tiny_model("llama"), tmp_path / "llama")
    capsys.readouterr()
    for command in (("evaluate",), ("advise", *MEMORY, "--context", 128)):
        said = complaint(capsys, command[0], llama, *command[1:], *asked[2:], "--window", 128, *states[:2])
        assert "state_dtype is 'bfloat16'" in said
        assert "has no recurrent states" in said


def test_advice_counts_states(hybrid: str, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without questions, for which the tiny model's context is too short."""
    monkeypatch.setattr("kvbits.evaluation.survey.TASKS", ())
    sizes = ("--context", 256, "--window", 128, "--windows", 1, "--speed-context", 128, "--new-tokens", 4)
    found = written(tmp_path / "a.json", "advise", hybrid, "--text", book, *MEMORY, *sizes, "--kv-cache-dtype", "int8")
    geometry = geometry_of(tiny_config("bamba"))
    right = plan(geometry, [parse_policy("int8", 2)], 8 << 20, [256]).schemes[0].contexts[0].sessions
    row = next(c for c in found["candidates"] if c["dtype"] == "int8")
    assert row["sessions"] == right < PoolLayout.of(geometry, parse_policy("int8", 2)).sessions(8 << 20, 256)
    asked = ("advise", hybrid, "--text", book, *MEMORY, *sizes, "--kv-cache-dtype", "int8", "--state-dtype", "bfloat16")
    found = written(tmp_path / "b.json", *asked)
    smaller = plan(geometry.stored_in("bfloat16"), [parse_policy("int8", 2)], 8 << 20, [256]).schemes[0].contexts[0]
    row = next(c for c in found["candidates"] if c["dtype"] == "int8, states in bfloat16")
    assert row["sessions"] == smaller.sessions > right
    chosen = found["advice"].split(":")[0]
    assert chosen in {f"Use --kv-cache-dtype {dtype} --state-dtype bfloat16" for dtype in ("bf16", "int8")}


def test_what_has_no_place_for_states_is_told_in_one_line(
    hybrid: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded, and with status 2."""

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("kvbits.models.load_model", unexpected)
    has = "has no place for the states of recurrent layers"
    text = ("--text", book, "-o", tmp_path / "out")
    assert f"calibration {has}" in complaint(capsys, "calibrate", hybrid, *text, "--bits", 4.6, "--window", 256)
    to = ("--to", "modelopt", "--window", 128)
    assert f"export to modelopt {has}" in complaint(capsys, "export", hybrid, *text, *to)
    dtype = ("--kv-cache-dtype", "int8", *MEMORY)
    pages = tmp_path / "pages.safetensors"
    assert f"a bundle of pages {has}" in complaint(capsys, "cache", "save", hybrid, pages, "-p", "w5", *dtype)
    pages.write_bytes(b"")
    assert f"a bundle of pages {has}" in complaint(capsys, "serve", hybrid, "--cache-file", pages, *dtype)
    asked = ("generate", hybrid, "-p", "w5", *dtype)
    drafts = ("--speculative-config", '{"method": "self"}')
    assert f"the speculative method 'self' {has}" in complaint(capsys, *asked, *drafts)
    draft = json.dumps({"method": "draft_model", "model": hybrid})
    assert f"a draft model's cache {has}" in complaint(capsys, *asked, "--speculative-config", draft)
    assert "state_dtype is 'int4'; choose from" in complaint(capsys, *asked, "--state-dtype", "int4")
    llama = save(tiny_model("llama"), tmp_path / "llama")
    capsys.readouterr()  # the progress of writing it
    refused = complaint(
        capsys, "serve", llama, "--kv-cache-dtype", "int8", *MEMORY, "--mamba-ssm-cache-dtype", "float32"
    )
    assert "state_dtype is 'float32'" in refused
    assert "has no recurrent states" in refused
    assert not (tmp_path / "out").exists()


def test_flags_name_layers_by_the_models_numbers(hybrid: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Attention is in layers 1 and 3; the policy counts them 0 and 1."""
    flags = ("export", hybrid, "--to", "flags", "--engine", "vllm")
    assert status(*flags, "--kv-cache-dtype", "0:bf16,1:int8") == 0
    assert "--kv-cache-dtype-skip-layers 1" in capsys.readouterr().out
    plain = translate(parse_policy("0:bf16,1:int8", 2), "vllm")
    assert plain.arguments[-2:] == ("--kv-cache-dtype-skip-layers", "0")


def test_a_configuration_that_is_none_is_told_in_one_line(
    hybrid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((Path(hybrid) / "config.json").read_text(encoding="utf-8"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**fields, "time_step_limit": "soon"}), encoding="utf-8")
    said = complaint(capsys, "plan", file, "--memory", "1GiB")
    assert "transformers cannot read the configuration" in said
    assert status("plan", file, "--memory", "1GiB") == 2
