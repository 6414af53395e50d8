"""Dtypes that do not fit a model, how they are drawn, and how a file says that its model samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import complaint, status
from helpers.gguf_files import save_gguf
from helpers.tiny import tiny_config, tiny_model

from kvbits.codecs import SCHEMES
from kvbits.models.gguf import GgufFile
from kvbits.models.sampling import published, sampling_defaults
from kvbits.planning.colours import colour_of, dash_of


def test_dtypes_that_do_not_fit_are_left_out_unless_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(tiny_config("llama", head_dim=80).to_dict()))
    assert status("plan", config, "--memory", "1GiB", "--json", out) == 0
    assert "Left out: int4b64, mix8_4, mix8_2, mix4_2: head size 80 is not a multiple of 64." in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {scheme["dtype"] for scheme in found["schemes"]} | set(found["left_out"]) == set(SCHEMES)
    assert {"mix8_4", "int5"} <= set(found["left_out"])
    asked = ("plan", config, "--memory", "1GiB", "--kv-cache-dtype", "mix8_4")
    assert "head size 80 is not a multiple of 64" in complaint(capsys, *asked)
    line = complaint(capsys, "plan", "llama-3.1-8b", "--memory", "8GiB")
    assert "8 GiB leave nothing for the KV cache: weights take 14.96 GiB" in line


def test_every_dtype_has_a_look_of_its_own() -> None:
    assert len({colour_of(name) for name in SCHEMES}) == len(SCHEMES)
    assert colour_of("0-1:int8,2-29:int4") == colour_of("0-1:int8,2-29:int4")
    assert len({(colour_of(name), dash_of(name)) for name in SCHEMES}) == len(SCHEMES)


def test_sampling_of_a_gguf_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = save_gguf(model, tmp_path / "plain.gguf", {"general.name": "Something"})
    assert published(GgufFile(Path(plain))) == {}
    said = {"general.sampling.temp": 0.5, "general.sampling.top_k": 9, "general.basename": "Qwen2.5"}
    own = published(GgufFile(Path(save_gguf(model, tmp_path / "own.gguf", said))))
    assert own == {"temperature": 0.5, "top_k": 9}, "what the file says goes before the table"
    for name, temperature in (("Qwen2.5 Coder 0.5B", 0.7), ("Smollm2 135M", 0.2), ("Meta Llama 3.1 8B", 0.6)):
        file = GgufFile(Path(save_gguf(model, tmp_path / "named.gguf", {"general.name": name})))
        assert published(file)["temperature"] == temperature
    for base, penalty in (("Smollm2 135M 8k", 1.15), ("SmolLM2 1.7B Instruct", 1.1)):
        named = {"general.name": base, "general.basename": "smollm2"}
        file = GgufFile(Path(save_gguf(model, tmp_path / "named.gguf", named)))
        assert published(file)["repetition_penalty"] == penalty, "the closer name goes before"
    assert sampling_defaults(None) == {}
