"""GGUF files whose bits are multiplied as they are: the same values as unpacked, held once, and the same answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from helpers.gguf_files import save_gguf, tensors_of
from helpers.tiny import randomized, save, tiny_model
from helpers.weight_bytes import random_rows

from kvbits.errors import ConfigError
from kvbits.models import load_model
from kvbits.models.load import wrap
from kvbits.models.locate import locate
from kvbits.models.packed import PackedEmbedding, PackedLinear, packed_parameters, packed_weights
from kvbits.models.reader import Reader
from kvbits.models.stored import StoredParameter
from kvbits.weights import FORMATS

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "olmo2", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")
MIX = ("Q8_0", "Q4_0", "Q5_1", "Q4_1", "Q5_0", "F16")
"""In the order of the tensors, again and again, so that parts of merged products differ."""

EVERY_EXPERT = {"mixtral": 5, "qwen3_moe": 6}
"""So that no last bit decides which experts a token goes to."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def mixed_file(model: Any, path: Path) -> str:
    stored = [name for name, values in tensors_of(model).items() if values.ndim > 1]
    kinds = {name: GGMLQuantizationType[MIX[i % len(MIX)]] for i, name in enumerate(stored)}
    return save_gguf(model, path, kinds=kinds)


def model_of(family: str, tied: bool) -> Any:
    changes = {"query_pre_attn_scalar": 32} if family.startswith("gemma") else {}
    if family == "gemma3_text":
        changes["layer_types"] = ["sliding_attention"] * 3
    if family == "qwen3_moe":
        changes = {"mlp_only_layers": [], "moe_intermediate_size": 64}
    if family in EVERY_EXPERT:
        changes["num_experts_per_tok"] = EVERY_EXPERT[family]
    return tiny_model(family, tie_word_embeddings=tied, **changes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_values_as_unpacked(family: str, tied: bool, tmp_path: Path) -> None:
    """Bit for bit, with the biases in float32, and the fingerprint does not tell how it was loaded."""
    path = mixed_file(model_of(family, tied), tmp_path / "m.gguf")
    plain = Reader("m", locate(path)).weights(torch.float32)()
    found = Reader("m", locate(path)).weights(torch.bfloat16, native=True)()
    expected = dict(plain.named_parameters())
    assert len({weight.weight_format.name for _, weight in packed_weights(found)}) >= 4
    packed = {name: (shape, rows) for name, shape, rows in packed_parameters(found)}
    assert any(name.endswith("experts.down_proj") for name in packed) == (family in EVERY_EXPERT)
    for name, (shape, rows) in packed.items():
        assert torch.equal(rows(torch.arange(math.prod(shape[:-1]))).reshape(shape), expected.pop(name)), name
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.pop(name).to(torch.bfloat16)), name
    assert not expected
    assert wrap(found, None, "m").fingerprint == wrap(plain, None, "m").fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_but_for_the_rounding_of_inputs(family: str, tmp_path: Path) -> None:
    path = mixed_file(model_of(family, True), tmp_path / "m.gguf")
    tokens = torch.randint(4, 97, (1, 60), generator=torch.Generator().manual_seed(2))
    models = [Reader("m", locate(path)).weights(*how)() for how in ((torch.float32,), (torch.bfloat16, None, True))]
    with torch.inference_mode():
        plain, found = (model(input_ids=tokens).logits.float() for model in models)
    assert (found - plain).norm() < 0.05 * plain.norm()


def test_a_shared_embedding_is_held_once(tmp_path: Path) -> None:
    path = mixed_file(model_of("gemma3_text", True), tmp_path / "m.gguf")
    model = Reader("m", locate(path)).weights(torch.bfloat16, native=True)()
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exact = Reader("m", locate(path)).weights(torch.bfloat16)()
    ids = torch.tensor([[5, 0], [96, 5]])
    assert torch.equal(model.model.embed_tokens(ids), exact.model.embed_tokens(ids))


def wide_model(family: str = "llama") -> Any:
    """Rows of 256 inputs, as the formats with super-blocks need."""
    return randomized(tiny_model(family, hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=2))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_super_blocks_run_fused(family: str, tmp_path: Path) -> None:
    """Q, K, V, gate and up of different formats."""
    model = wide_model(family)
    kinds, bytes_of = {}, {}
    for i, (name, values) in enumerate(tensors_of(model).items()):
        if values.ndim > 1 and "ffn_gate_inp" not in name:
            form = FORMATS[("q4_k", "q6_k", "q5_k")[i % 3]]
            kinds[name] = GGMLQuantizationType(form.native_id)
            rows = random_rows(form, math.prod(values.shape[:-1]), values.shape[-1] // 256, i)
            bytes_of[name] = rows.reshape(*values.shape[:-1], -1)
    path = save_gguf(model, tmp_path / "m.gguf", extra=bytes_of, kinds=kinds)
    loaded = load_model(path)
    assert loaded.fused is not None
    assert {w.weight_format.name for _, w in packed_weights(loaded.model)} == {"q4_k", "q5_k", "q6_k"}
    assert loaded.depends_on_rows() is None
    unpacked = load_model(path, weights="bf16")
    assert {w.weight_format.name for _, w in packed_weights(unpacked.model)} == {"bf16"}
    assert unpacked.fingerprint == loaded.fingerprint


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_checkpoint_is_rounded(weights: str, tmp_path: Path) -> None:
    """In float32 the rounded values are unpacked again: the same ones."""
    path = save(tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16), tmp_path)
    rounded = load_model(str(path), weights=weights)
    wide = load_model(str(path), "float32", weights=weights)
    plain = load_model(str(path), weights="auto")
    assert rounded.fused is not None
    assert rounded.fingerprint == wide.fingerprint == plain.fingerprint
    expected = dict(wide.model.named_parameters())
    for name, weight in packed_weights(rounded.model):
        assert weight.weight_format.bits < 10
        assert torch.equal(weight.unpack(torch.arange(weight.out_features)), expected[name]), name
    assert rounded.model.lm_head.weight is rounded.model.model.embed_tokens.weight
    assert plain.model.lm_head.weight is plain.model.model.embed_tokens.weight


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_nothing_is_unpacked_before_it_is_packed(family: str, weights: str, tmp_path: Path) -> None:
    """Every layer's weight waits in the file without memory; what it becomes is the float32 values rounded once."""
    path = mixed_file(model_of(family, True), tmp_path / "m.gguf")
    kept = Reader("m", locate(path)).weights(torch.bfloat16, packs=True)()
    waiting = {name for name, p in kept.named_parameters() if isinstance(p, StoredParameter) and p.is_meta}
    held = {name for name, p in kept.named_parameters() if p.ndim > 1} - waiting
    assert len(waiting) >= 1 + 3 * 5
    assert all(name.endswith("mlp.gate.weight") for name in held), "only routers, which are small"
    loaded, wide = load_model(path, weights=weights), load_model(path, "float32", weights=weights)
    assert not any(isinstance(p, StoredParameter) for p in loaded.model.parameters())
    assert loaded.fingerprint == wide.fingerprint == load_model(path).fingerprint
    packed = {name: (shape, rows) for name, shape, rows in packed_parameters(loaded.model)}
    assert waiting <= packed.keys()
    for name in waiting:
        shape, rows = packed[name]
        found, expected = rows(torch.arange(math.prod(shape[:-1]))).reshape(shape), wide.model.get_parameter(name)
        assert torch.equal(found, expected.to(torch.bfloat16).float() if weights == "bf16" else expected), name


def test_an_unknown_form_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="unknown weights 'int3'; choose from auto, bf16, int8, int4"):
        load_model("smollm2-135m", weights="int3")
