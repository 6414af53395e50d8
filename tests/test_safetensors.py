"""Directories of safetensors: the model that transformers loads, out of the files' maps, and what cannot be named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILIES, save, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models import load_model
from kvbits.models.hub import checkpoint
from kvbits.models.locate import Source, locate
from kvbits.models.packed import PackedEmbedding, packed_weights
from kvbits.models.reader import Reader
from kvbits.models.stored import StoredParameter

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read(directory: Path, dtype: torch.dtype = torch.bfloat16, packs: bool = False) -> Any:
    return Reader("m", locate(str(directory))).weights(dtype, packs=packs)()


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_state_is_that_of_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In several files, with or without a tied head."""
    model = tiny_model(family, tie_word_embeddings=family in ("llama", "gemma2", "gemma3_text")).to(torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    expected, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), read(tmp_path, dtype)
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, values in expected.state_dict().items():
        assert state[name].dtype == values.dtype, name
        assert torch.equal(state[name], values), name
    for (name, values), other in zip(expected.named_buffers(), found.buffers(), strict=True):
        assert torch.equal(other, values), name
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (
        expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
    )
    assert not found.training


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_no_weight_is_copied_before_it_is_packed(stored: str, weights: str, tmp_path: Path) -> None:
    """Layers' weights lie in the map, in the file's own type, until they are packed, and none is left there."""
    model = tiny_model("llama", tie_word_embeddings=True)
    save(model.to(STORED[stored]), tmp_path)
    kept = read(tmp_path, packs=True)
    lying = [p for p in kept.parameters() if isinstance(p, StoredParameter)]
    assert {p.dtype for p in lying} == {STORED[stored]}
    assert len(lying) == 1 + 3 * 7  # the embedding, and a layer's projections
    loaded = load_model(str(tmp_path), weights=weights)
    assert not any(isinstance(p, StoredParameter) for p in loaded.model.parameters())
    assert isinstance(loaded.model.model.embed_tokens, PackedEmbedding)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.fused is not None
    wide = load_model(str(tmp_path), "float32", weights=weights)
    assert wide.fingerprint == loaded.fingerprint
    for name, weight in packed_weights(loaded.model):
        expected = wide.model.get_parameter(name)
        expected = expected.to(torch.bfloat16).float() if weights == "auto" else expected
        assert torch.equal(weight.unpack(torch.arange(weight.out_features)), expected), name


def test_an_untied_embedding_stays_in_its_type(tmp_path: Path) -> None:
    save(tiny_model("qwen2").to(torch.float16), tmp_path)
    model = load_model(str(tmp_path)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_file_is_not_changed_by_what_is_done_to_the_model(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = read(tmp_path, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_generation_configuration_is_obeyed(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 7]).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.sampling_defaults["temperature"] == 0.3
    assert loaded.model.generation_config.eos_token_id == [2, 7]


def test_a_head_of_its_own_beside_a_tied_configuration(tmp_path: Path) -> None:
    """Kept if it differs, as by transformers; else held once."""
    save(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same = read(tmp_path)
    assert same.lm_head.weight is same.model.embed_tokens.weight
    rewrite(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    other = read(tmp_path)
    assert torch.equal(other.lm_head.weight, other.model.embed_tokens.weight * 2)


NORM = "model.layers.1.input_layernorm.weight"
BAD = {
    "missing": (lambda t: t.pop(NORM), ConfigError, f"no tensor {NORM}"),
    "embedding": (lambda t: t.pop("model.embed_tokens.weight"), ConfigError, "no tensor model.embed_tokens.weight"),
    "shape": (lambda t: t.update({NORM: torch.ones(5)}), ConfigError, rf"{NORM} .*\[5\].*\[64\]"),
    "float8": (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), UnsupportedError, rf"{NORM} .*F8_E4M3"),
    "bias": (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}), UnsupportedError, "up_proj.bias"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_tensor_that_does_not_fit_is_named_before_one_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, says = BAD[case]
    save(tiny_model("llama"), tmp_path)
    rewrite(tmp_path, change)
    monkeypatch.setattr("kvbits.models.safetensors.weights.Weights.read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(error, match=says):
        load_model(str(tmp_path))


def test_harmless_tensors_are_left_out(tmp_path: Path) -> None:
    """A bias of zeros, as tools write it, and what the model computes itself."""
    save(tiny_model("llama"), tmp_path)
    expected = read(tmp_path).state_dict()
    extra = {
        "model.layers.0.mlp.up_proj.bias": torch.zeros(96),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    rewrite(tmp_path, lambda t: t.update(extra))
    assert read(tmp_path).state_dict().keys() == expected.keys()


def test_experts_without_one_of_them_are_refused(tmp_path: Path) -> None:
    """Parameters that transformers puts together: it would make up what is missing."""
    save(tiny_model("deepseek_v3"), tmp_path)
    names = []
    rewrite(tmp_path, lambda t: names.append(next(n for n in t if "experts.2.down_proj" in n)) or t.pop(names[0]))
    with pytest.raises(ConfigError, match="expert"):
        load_model(str(tmp_path))


def test_an_index_that_names_another_place_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.layers.9.mlp.up_proj.weight"] = table["weight_map"][NORM]
    index.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.9\.mlp\.up_proj\.weight, which"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("offsets", [[0, 100], [-4, 16380], [8, 4]])
def test_bytes_that_do_not_fit_a_shape_are_refused(offsets: list[int], tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[NORM]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(ConfigError, match=f"tensor {NORM} has the shape"):
        load_model(str(tmp_path))


def test_files_in_the_hubs_cache_are_found_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--model", "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    assert checkpoint(Source("some/model")) is None
    tiny_model("llama").save_pretrained(snapshot, max_shard_size="60KB")
    assert checkpoint(Source("some/model")) == snapshot
    for file in snapshot.glob("*.safetensors*"):
        file.unlink()
    tiny_model("llama").save_pretrained(snapshot)
    assert checkpoint(Source("some/model")) == snapshot
