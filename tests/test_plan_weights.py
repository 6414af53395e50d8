"""The planner's bytes of weights are those that the loader then holds, whatever the files have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from helpers.carried_files import Form, awq, change_config, compressed, of_compressed, write
from helpers.command import complaint, status
from helpers.gguf_files import save_gguf, tensors_of
from helpers.tiny import save, tiny_config, tiny_model

from kvbits.config import WEIGHT_FORMATS
from kvbits.models import load_model
from kvbits.models.facts import facts_of_model
from kvbits.models.packed import packed_weights

KINDS = ("Q8_0", "Q4_0", "F16", "Q5_1", "Q4_1")
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loaded_bytes(name: str, weights: str) -> int:
    """Everything that a loaded model holds, biases of packed layers in float32."""
    model = load_model(name, weights=weights).model
    packed = [weight for _, weight in packed_weights(model)]
    biases = sum(4 * weight.bias.numel() for weight in packed if weight.bias is not None)
    return sum(w.bytes for w in packed) + biases + sum(p.numel() * p.element_size() for p in model.parameters())


def gguf_file(family: str, tied: bool, path: Path) -> str:
    model = tiny_model(family, tie_word_embeddings=tied)
    stored = [name for name, values in tensors_of(model).items() if values.ndim > 1]
    kinds = {name: GGMLQuantizationType[KINDS[i % len(KINDS)]] for i, name in enumerate(stored)}
    return save_gguf(model, path, kinds=kinds)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("mixtral", False)])
def test_gguf_files(family: str, tied: bool, weights: str, tmp_path: Path) -> None:
    path = gguf_file(family, tied, tmp_path / "m.gguf")
    facts = facts_of_model(path)
    assert facts.weights == "auto"
    assert facts.held[weights] == loaded_bytes(path, weights)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_plain_checkpoints(family: str, weights: str, tmp_path: Path) -> None:
    """With biases, experts side by side or in turns, from the weights' directory and from its configuration alone."""
    model: Any = tiny_model(family)
    path = str(save(model.to(torch.bfloat16), tmp_path))
    assert facts_of_model(path).held[weights] == loaded_bytes(path, weights)
    assert facts_of_model(f"{path}/config.json").held == facts_of_model(path).held


@pytest.mark.parametrize(
    "form", [Form(awq, AWQ, 4, 64, False), Form(compressed, of_compressed(8, True), bits=8)], ids=["awq", "w8a16"]
)
def test_checkpoints_in_bits(form: Form, tmp_path: Path) -> None:
    model = tiny_model("qwen2", hidden_size=128, head_dim=32, intermediate_size=256, num_hidden_layers=2)
    write(model, tmp_path, form)
    facts = facts_of_model(str(tmp_path))
    for weights in WEIGHT_FORMATS:
        assert facts.held[weights] == loaded_bytes(str(tmp_path), weights), weights
    assert facts.held["auto"] < facts.held["bf16"]
    alone = facts_of_model(f"{tmp_path}/config.json")
    assert (alone.weights, alone.held) == ({4: "awq", 8: "w8a8"}[form.bits], {})


def test_the_packaged_model_from_the_command_line(tmp_path: Path) -> None:
    """Although the tables have it too, as published; other forms by name."""
    out = tmp_path / "plan.json"
    found = {}
    for weights in (None, "AUTO", "bf16", "int4", "fp8"):
        given = () if weights is None else ("--weights", weights)
        assert status("plan", "smollm2-135m", "--memory", "2GiB", "--context", 512, *given, "--json", out) == 0
        found[weights] = json.loads(out.read_text())["weights_bytes"]
    assert found[None] == found["AUTO"] == loaded_bytes("smollm2-135m", "auto")
    assert found["bf16"] == pytest.approx(2 * 134515008, rel=1e-3)
    assert found["int4"] == pytest.approx(5 / 8 * 134515008, rel=1e-2)
    assert found["fp8"] == 134515008 + 49152 * 576


def test_weights_that_kvbits_does_not_run_are_planned_as_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tiny_model("llama"), tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "fp8"})
    facts = facts_of_model(str(tmp_path))
    assert (facts.weights, facts.held) == ("fp8", {})
    capsys.readouterr()
    (tmp_path / "plain.json").write_text(json.dumps(tiny_config("llama").to_dict()))
    said = complaint(capsys, "plan", tmp_path / "plain.json", "--memory", "1GiB", "--weights", "int3")
    assert "unknown weights 'int3'; choose from auto, fp32, bf16" in said
