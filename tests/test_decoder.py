"""The fused decoder and the packed products against torch and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbits.kernels.products import Products
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.load import LoadedModel, wrap
from kvbits.models.packed import PackedLinear, depends_on_rows, pack_linears

SMALL = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def llama(**changes: object) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**(SMALL | changes)))


MODELS = {
    "llama": llama,
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, gelu": lambda: llama(hidden_act="gelu_pytorch_tanh"),
    "llama, eps": lambda: llama(rms_norm_eps=0.3),
    "llama, wide heads": lambda: llama(head_dim=80),
    "llama, scaled rope": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=32, **SMALL)),
}


def loaded(model: nn.Module, weights: str = "bf16") -> LoadedModel:
    torch.manual_seed(3)
    for parameter in model.parameters():  # the default initialisation hardly moves the residual stream
        with torch.no_grad():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    found = wrap(model.to(torch.bfloat16), None, "small")
    pack_linears(found.model, weights)
    return found


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_structure_are_fused(name: str, weights: str) -> None:
    """``fuse`` itself compares the logits with transformers' own code and refuses what differs."""
    torch.manual_seed(1)
    small = loaded(MODELS[name](), weights)
    fused = fuse(small.model, small.geometry)
    assert isinstance(fused, FusedModel), fused


@pytest.mark.parametrize("fault", ["norm", "weight", "last norm"])
def test_a_model_that_computes_something_else_is_not_fused(fault: str) -> None:
    torch.manual_seed(1)
    small = loaded(llama())
    layer = small.model.model.layers[1]
    if fault == "norm":  # looks like any norm, but adds one to its weight, as Gemma's do
        plain = type(layer.input_layernorm).forward
        layer.input_layernorm.forward = lambda x: plain(layer.input_layernorm, x) * 2
    elif fault == "weight":
        layer.mlp.down_proj.forward = lambda x: PackedLinear.forward(layer.mlp.down_proj, x) * 1.5
    else:
        small.model.model.norm.forward = lambda x: x
    reason = fuse(small.model, small.geometry)
    assert isinstance(reason, str)
    assert "differ" in reason


def packed(linear: nn.Linear) -> PackedLinear:
    products = Products()
    return PackedLinear(products.pack(linear.weight, linear.bias), products)


@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (200, 96), (1, 2), (17, 130), (33, 576)])
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 25, 70])
def test_products_against_float64(out_features: int, in_features: int, rows: int) -> None:
    """bfloat16 in and out, sums in float32: the error is that of rounding the result, and of the sum."""
    generator = torch.Generator().manual_seed(rows)
    linear = nn.Linear(in_features, out_features, bias=rows % 2 == 0).to(torch.bfloat16)
    x = torch.randn(rows, in_features, generator=generator).to(torch.bfloat16)
    layer = packed(linear)
    exact = x.double() @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
    bound = exact.abs() / 256 + in_features * 2**-22 * (x.double().abs() @ linear.weight.double().abs().T) / 8 + 1e-30
    assert ((layer(x).double() - exact).abs() <= bound).all()
    assert layer(x[:, None]).shape == (rows, 1, out_features)


def test_products_do_not_depend_on_the_rows_beside() -> None:
    torch.manual_seed(1)
    assert depends_on_rows(loaded(llama()).model) is None


def test_strided_rows() -> None:
    linear = nn.Linear(64, 32).to(torch.bfloat16)
    layer = packed(linear)
    wide = torch.randn(5, 128).to(torch.bfloat16)
    assert torch.equal(layer(wide[:, 64:]), layer(wide[:, 64:].contiguous()))
