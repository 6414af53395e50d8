"""``kvbits calibrate``: what it writes, what other commands make of it, and its mistakes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers.command import complaint, status
from helpers.tiny import save, tiny_model

from kvbits.auto.loss import nats

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_model("llama", head_dim=32), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    source = random.Random(5)
    path.write_text(" ".join(f"w{source.randrange(4, 97)}" for _ in range(1500)))
    return str(path)


SMALL = ("--context", CONTEXT, "--windows", 2, "--check-windows", 1)


def test_calibrate_then_use(model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, out = tmp_path / "policy", tmp_path / "out.json"
    assert status("calibrate", model, "--text", text, "--bits", 6.5, "-o", policy, *SMALL) == 0
    assert "checked on 1 windows: KL" in capsys.readouterr().out
    document = json.loads((policy / "policy.json").read_text())
    assert document["bits_per_element"] <= 6.5
    kl = document["measured"]["check"]["kl_mean"]
    assert kl > 0
    generate = ("generate", model, "--kv-policy", policy, "-p", "w5 w6", "--max-tokens", 4)
    assert status(*generate) == 0
    line = f"policy:{policy} on this model: KL {nats(kl)}, measured on {CONTEXT // 2 - 1} tokens of words.txt"
    assert line in capsys.readouterr().err.splitlines()
    common = ("--text", text, "--context", CONTEXT, "--windows", 1, "--json", out)
    assert status("evaluate", model, "--kv-policy", policy, "--kv-cache-dtype", "int2", *common) == 0
    coarse, fitted = json.loads(out.read_text())["results"]
    assert (coarse["dtype"], fitted["dtype"]) == ("int2", f"policy:{policy}")
    assert fitted["kl_mean"] < coarse["kl_mean"]
    other = save(tiny_model("llama", seed=1, head_dim=32), tmp_path / "other")
    capsys.readouterr()
    assert "was calibrated for" in complaint(capsys, "generate", other, "--kv-policy", policy, "-p", "w5")


def test_dtypes_that_a_head_size_rules_out_are_not_chosen(text: str, tmp_path: Path) -> None:
    small = save(tiny_model("llama", head_dim=16), tmp_path / "small")
    assert status("calibrate", small, "--text", text, "--bits", 6, "-o", tmp_path / "policy", *SMALL) == 0
    names = json.loads((tmp_path / "policy" / "policy.json").read_text())["layers"]
    assert not {"int3", "int5"} & {name.split("/")[0] for name in names}


def test_calibrate_without_a_text(model: str, tmp_path: Path) -> None:
    assert status("calibrate", model, "--bits", 5, "-o", tmp_path, *SMALL) == 0
    measured = json.loads((tmp_path / "policy.json").read_text())["measured"]
    assert measured["texts"] == []
    assert 0 < measured["check"]["kl_mean"] < 0.1


def test_calibrate_to_a_divergence(model: str, text: str, tmp_path: Path) -> None:
    assert status("calibrate", model, "--text", text, "--max-kl", 0.05, "-o", tmp_path, *SMALL) == 0
    assert json.loads((tmp_path / "policy.json").read_text())["measured"]["check"]["kl_mean"] <= 0.05


def test_mistakes_are_one_clear_line(model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*options: object, source: object = text) -> str:
        return complaint(capsys, "calibrate", model, "--text", source, "-o", tmp_path / "p", *options)

    assert "exactly one of" in wrong()
    assert "exactly one of" in wrong("--bits", 4, "--max-kl", 0.1)
    assert "--bits is -1.0" in wrong("--bits", -1)
    assert "1 bits per element cannot be met; the least possible is 2.375" in wrong("--bits", 1, *SMALL)
    assert "cannot fit 1024 bytes" in wrong("--memory", "1KiB", *SMALL)
    assert "windows of 256" in wrong("--bits", 5, "--context", CONTEXT, "--windows", 20)
    assert "too short" in wrong("--bits", 5, "--context", 128, "--windows", 2)
    assert "unknown KV cache dtype 'int9'" in wrong("--bits", 5, "--sink", "int9", *SMALL)
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9")
    assert "is empty" in wrong("--bits", 5, source=empty)
    assert "not UTF-8" in wrong("--bits", 5, source=latin)
    assert status("calibrate", model, "--text", text, "-o", tmp_path / "p", "--max-kl", 1e-9, *SMALL) == 2
    assert "a predicted KL of 1e-09 cannot be met; the least possible is" in capsys.readouterr().err
    assert "nothing to run" in complaint(capsys, "evaluate", model, "--text", text)
    assert "cannot read the policy file" in complaint(capsys, "generate", model, "-p", "w5", "--kv-policy", tmp_path)
