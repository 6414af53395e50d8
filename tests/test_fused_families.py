"""The fused decoder on every family that it knows, against transformers' own float32 forward and generate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from helpers.driver import Driver
from helpers.gguf_files import save_gguf, tensors_of
from helpers.tiny import VOCAB, randomized, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, OlmoConfig

from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.kernels.products import Products
from kvbits.models import load_model
from kvbits.models.experts import PackedExperts, gate_of, pack_experts
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.load import LoadedModel, wrap
from kvbits.models.packed import depends_on_rows, pack_linears, packed_weights
from kvbits.weights import FORMATS

EVERY_EXPERT = {"gpt_oss": 4, "mixtral": 5, "qwen3_moe": 6}
"""How many a token goes to, so that no last bit decides which."""

FAMILIES = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", *EVERY_EXPERT)
LENGTH = 150
TOKENS = torch.randint(4, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
"""Longer than every window."""


def model_of(family: str, **changes: Any) -> Any:
    """Tiny, in bfloat16, with norms whose weights are not all the same."""
    if family == "gemma":
        changes["model_type"], family = "gemma", "llama"
    model = tiny_model(family, **changes).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def decided(family: str) -> Any:
    """A model whose router has no choice."""
    return model_of(family, **({"num_experts_per_tok": EVERY_EXPERT[family]} if family in EVERY_EXPERT else {}))


def fused(model: Any, weights: str = "bf16") -> LoadedModel:
    found = wrap(copy.deepcopy(model), None, "tiny")
    pack_linears(found.model, weights)
    made = fuse(found.model, found.geometry)
    assert isinstance(made, FusedModel), made
    return LoadedModel(found.model, None, found.geometry, "tiny", found.fingerprint, made)


def stepwise(loaded: LoadedModel, chunks: list[int], dtype: str = "bf16") -> Tensor:
    driver, at, parts = Driver(loaded, dtype, CpuBackend()), 0, []
    for count in chunks:
        parts.append(driver.step({0: TOKENS[at : at + count].tolist()})[0])
        at += count
    return torch.cat(parts)


@torch.inference_mode()
def exact(model: Any, ids: Tensor = TOKENS) -> Tensor:
    return copy.deepcopy(model).float()(input_ids=ids[None]).logits[0]


def errors(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str) -> None:
    """As near to float32 as bfloat16 products are, behind windows and page after page."""
    model = decided(family)
    found = errors(stepwise(fused(model), [70, 60, *[1] * 20]), exact(model))
    assert found.max() < 0.1, found.max()
    assert found.median() < 0.025, found.median()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt_oss"])
def test_logits_on_every_instruction_set(family: str, isa: str) -> None:
    model = decided(family)
    found = Driver(fused(model), "bf16", CpuBackend(isa)).step({0: TOKENS.tolist()})[0]
    assert errors(found, exact(model)).max() < 0.1


@pytest.mark.parametrize("family", EVERY_EXPERT)
def test_some_experts_are_those_of_the_router(family: str) -> None:
    """A near tie goes another way and later tokens see it: most tokens agree."""
    model = model_of(family)
    found = errors(stepwise(fused(model), [LENGTH]), exact(model))
    assert found.quantile(0.6) < 0.1, found.quantile(0.6)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_transformers(family: str) -> None:
    """Token by token behind its text, from a 16-bit cache; another token only where its best two are nearly tied."""
    model = decided(family)
    prompt, count = TOKENS[:90], 24
    out = copy.deepcopy(model).float().generate(
        prompt[None], max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None,
    )  # fmt: skip
    driver, ids, agreed = Driver(fused(model), "bf16", CpuBackend()), prompt.tolist(), 0
    for logits, expected in zip(out.logits, out.sequences[0, len(prompt) :].tolist(), strict=True):
        token = int(driver.step({0: ids})[0][-1].argmax())
        assert token == expected or logits[0, expected] - logits[0, token] < 0.1 * logits.std(), agreed
        ids, agreed = [expected], agreed + (token == expected)
    assert agreed >= count - 3


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_whatever_else_is_in_the_batch(family: str, weights: str) -> None:
    loaded = fused(model_of(family), weights)
    assert loaded.depends_on_rows() is None
    prompts = {0: TOKENS[:75].tolist(), 1: TOKENS[20:53].tolist(), 2: TOKENS[5:141].tolist(), 3: TOKENS[60:61].tolist()}
    together = Driver(loaded, "int8", CpuBackend()).step(prompts)
    for s, prompt in prompts.items():
        alone = Driver(loaded, "int8", CpuBackend(threads=1))
        assert torch.equal(alone.step({s: prompt})[s], together[s])
    chunks = stepwise(loaded, [3, 61, 1, 10], "int8")
    assert torch.equal(chunks, together[0])


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", EVERY_EXPERT)
def test_experts_are_rounded_too(family: str, weights: str) -> None:
    loaded = fused(model_of(family), weights)
    formats = {name: weight.weight_format.name for name, weight in packed_weights(loaded.model)}
    experts = {kind for name, kind in formats.items() if ".experts." in name}
    assert experts == {"int8" if weights == "int8" else "q4_1"}


def small_file(family: str, kind: str, path: Path) -> tuple[Any, str]:
    changes: dict[str, Any] = {"query_pre_attn_scalar": 32} if family.startswith("gemma") else {}
    if family == "gemma3_text":
        changes["layer_types"] = ["sliding_attention"] * 3
    if family == "qwen3_moe":
        changes |= {"mlp_only_layers": [], "moe_intermediate_size": 64}
    model = tiny_model(family, **changes)
    kinds = {
        name: GGMLQuantizationType[kind if not name.startswith("token_embd") else "Q8_0"]
        for name, values in tensors_of(model).items()
        if values.ndim > 1 and "ffn_gate_inp" not in name
    }
    return model, save_gguf(model, path / "m.gguf", kinds=kinds)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen3_moe"])
def test_files_run_fused_in_their_own_bits(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same file unpacked to float32, by transformers' own code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, path = small_file(family, kind, tmp_path)
    loaded = load_model(path)
    assert loaded.fused is not None
    assert loaded.depends_on_rows() is None
    assert {weight.weight_format.name for _, weight in packed_weights(loaded.model)} == {kind.lower(), "q8_0"}
    plain = load_model(path, "float32")
    assert plain.fingerprint == loaded.fingerprint
    found = errors(stepwise(loaded, [LENGTH]), stepwise(plain, [LENGTH]))
    assert found.median() < 0.1, found.median()


@pytest.mark.parametrize("family", EVERY_EXPERT)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_packed_experts_against_transformers(family: str, rows: int) -> None:
    experts = model_of(family).model.layers[0].mlp.experts
    gate = gate_of(experts)
    assert gate is not None
    packed = pack_experts(experts, gate, Products(), FORMATS["bf16"])
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator).to(torch.bfloat16)
    chosen = torch.rand(rows, EVERY_EXPERT[family], generator=generator).argsort(1)[:, :2]
    shares = torch.rand(rows, 2, generator=generator)
    with torch.inference_mode():
        expected = experts.float()(x.float(), chosen, shares)
    assert errors(packed(x, chosen, shares).float(), expected).max() < 0.02


def other(name: str) -> Any:
    common = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"vocab_size": VOCAB, "pad_token_id": 0, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    if name == "granite":  # the same parts, and factors between them
        config = AutoConfig.for_model(name, residual_multiplier=0.3, embedding_multiplier=9.0, **common)
    else:
        config = OlmoConfig(**common)  # norms without weights
    return randomized(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16)


@pytest.mark.parametrize(("name", "says"), [("granite", "differ"), ("olmo", "norm"), ("deepseek_v3", "differ")])
def test_another_structure_is_left_alone(name: str, says: str) -> None:
    found = wrap(tiny_model(name).to(torch.bfloat16) if name == "deepseek_v3" else other(name), None, name)
    pack_linears(found.model)
    reason = fuse(found.model, found.geometry)
    assert isinstance(reason, str)
    assert says in reason
    if name == "deepseek_v3":  # its experts are packed all the same, and its router is not
        assert any(isinstance(module, PackedExperts) for module in found.model.modules())
        assert "mlp.gate" in str(depends_on_rows(found.model))


def spoil(model: Any, fault: str) -> None:
    """Let a part of transformers' own layers compute something that its look does not tell, or that is not known."""
    layer = model.model.layers[1]
    if fault == "norm after":
        part, change = layer.post_feedforward_layernorm, lambda y: y * 1.8
    elif fault == "attention":
        part, change = layer.self_attn.o_proj, lambda y: y * 1.8
    elif fault == "shares":
        part = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
        change = lambda y: (y[0], y[1] * 2, y[2])  # noqa: E731
    elif fault == "router's arguments":
        part, change = layer.mlp.gate, None
    else:
        part, change = layer.mlp.experts, lambda y: y * 1.8
    plain = part.forward
    part.forward = (lambda *given: change(plain(*given))) if change else (lambda x, bias: plain(x))


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("gemma3_text", "norm after"),
        ("olmo2", "norm after"),
        ("phi3", "attention"),
        ("gpt_oss", "shares"),
        ("mixtral", "shares"),
        ("qwen3_moe", "experts"),
        ("gpt_oss", "experts"),
        ("mixtral", "router's arguments"),
    ],
)
def test_parts_that_compute_something_else_are_not_fused(family: str, fault: str) -> None:
    found = wrap(model_of(family, **({"mlp_only_layers": []} if family == "qwen3_moe" else {})), None, family)
    pack_linears(found.model)
    spoil(found.model, fault)
    reason = fuse(found.model, found.geometry)
    assert isinstance(reason, str), fault
