"""Python code that comes with a model runs only where that was asked for, and nobody is asked on standard input."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import save, tiny_model

import kvbits
from kvbits.errors import KVBitsError
from kvbits.models import load_model
from kvbits.models.facts import facts_of_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with Path({marker!r}).open("a") as file:
    file.write("ran ")


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig


class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "mine.MineConfig",
    "AutoModelForCausalLM": "mine.MineForCausalLM",
    "AutoTokenizer": ["mine.MineTokenizer", "mine.MineTokenizer"],
}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("somebody was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(params=["configuration", "model", "tokenizer"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose configuration (and so everything), model or tokenizer is of a class of its own."""
    path = tmp_path / "m"
    save(tiny_model("llama"), path)
    (path / "mine.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    config = json.loads((path / "config.json").read_text())
    if request.param == "configuration":
        config |= {"model_type": "mine", "auto_map": CLASSES}
    elif request.param == "model":
        config |= {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": CLASSES["AutoModelForCausalLM"]}}
    else:
        tokenizer = json.loads((path / "tokenizer_config.json").read_text())
        tokenizer |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": CLASSES["AutoTokenizer"]}}
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_nothing_runs_unless_it_is_asked_for(directory: Path, tmp_path: Path) -> None:
    for act in (
        lambda: load_model(str(directory)),
        lambda: kvbits.LLM(str(directory)),
        lambda: facts_of_model(str(directory)),
        lambda: facts_of_model(str(directory / "config.json")),
    ):
        with contextlib.suppress(KVBitsError):
            act()
        assert not (tmp_path / "marker").exists()


def own_configuration(directory: Path) -> str:
    """A model whose configuration is of a class of its own."""
    path = directory / "m"
    save(tiny_model("llama"), path)
    (path / "mine.py").write_text(CODE.format(marker=str(directory / "marker")))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": CLASSES}))
    return str(path)


def test_the_error_names_the_option_and_the_option_runs_the_code(tmp_path: Path) -> None:
    name = own_configuration(tmp_path)
    for act in (load_model, kvbits.LLM, facts_of_model):
        with pytest.raises(KVBitsError, match="--trust-remote-code"):
            act(name)
    loaded = load_model(name, "float32", trust_remote_code=True)
    assert type(loaded.model).__name__ == "MineForCausalLM"
    assert loaded.trust_remote_code
    assert (tmp_path / "marker").read_text().startswith("ran")
    assert facts_of_model(name, trust_remote_code=True).geometry.num_layers == 3


@pytest.mark.parametrize("command", [["generate", "--prompt", "w5"], ["plan", "--memory", "1GiB"]])
def test_a_yes_on_standard_input_is_not_read(command: list[str], tmp_path: Path) -> None:
    first, *options = command
    run = subprocess.run(
        [sys.executable, "-c", "from kvbits.cli.main import run; run()", first, own_configuration(tmp_path), *options],
        input="y\ny\ny\n", capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert run.returncode != 0
    assert "--trust-remote-code" in run.stderr
    assert "[y/N]" not in run.stdout + run.stderr
    assert not (tmp_path / "marker").exists()
