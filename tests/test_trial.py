"""What depends on the position is seen when a model is loaded, though nothing shows it at a text's beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.plain_rows import PlainRows
from helpers.tiny import tiny_model
from helpers.zoo import ZOO
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from kvbits.kernels.cpu import CpuBackend
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.load import LoadedModel, wrap
from kvbits.models.packed import pack_linears

FAR = 400
"""Of a context of 512 tokens."""


def packed(family: str, **changes: Any) -> LoadedModel:
    loaded = wrap(tiny_model(family, **changes).to(torch.bfloat16), None, family)
    pack_linears(loaded.model)
    return loaded


def scaled(model: Any, part: Any, factor: float) -> None:
    """Let ``part`` give ``factor`` times its result for tokens at :data:`FAR` or beyond."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [kwargs["position_ids"]]

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    plain: Callable[..., Tensor] = part.forward

    def forward(x: Tensor) -> Tensor:
        found = plain(x)
        if not seen:  # a norm that is looked at alone
            return found
        factors = torch.where(seen[0] >= FAR, factor, 1.0)
        return found * factors.view(1, -1, *(1,) * (found.ndim - 2)).to(found.dtype)

    part.forward = forward


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_scale_that_begins_far_into_a_text_is_not_fused(family: str, part: str) -> None:
    loaded = packed(family)
    assert isinstance(fuse(loaded.model, loaded.geometry), FusedModel)
    scaled(loaded.model, getattr(loaded.model.model.layers[1].self_attn, part), 1.1)
    reason = fuse(loaded.model, loaded.geometry)
    assert isinstance(reason, str)
    assert "follow their positions, by 0.1 at" in reason


def test_nor_one_behind_a_norm_of_heads() -> None:
    loaded = packed("qwen3")
    scaled(loaded.model, loaded.model.model.layers[2].self_attn.q_norm, 1.1)
    assert "follow their positions" in str(fuse(loaded.model, loaded.geometry))


def test_nor_what_attention_does_not_see() -> None:
    loaded = packed("llama")
    scaled(loaded.model, loaded.model.model.layers[2].mlp.down_proj, 3.0)
    assert "transformers' own code at the end of its context" in str(fuse(loaded.model, loaded.geometry))


def test_ministral_3_runs_as_its_own_layers_for_what_its_queries_do() -> None:
    """Their scale is 1 for the first 64 tokens and 1.2 for the last ones, as 16,384 and 262,144 have it."""
    options = ZOO["ministral3"]
    loaded = packed(
        "ministral3", **{**options, "rope_parameters": {**options["rope_parameters"], "llama_4_scaling_beta": 0.1}}
    )
    assert "follow their positions, by 0.2" in str(fuse(loaded.model, loaded.geometry))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_fused_for_gpus_are_tried_far_away_too(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    from kvbits.models.fused_gpu import FusedGpuModel, fuse_on_gpu

    loaded = wrap(tiny_model("llama").to(dtype), None, "llama")
    found = fuse_on_gpu(loaded.model, loaded.geometry, CpuBackend(), PlainRows())
    assert isinstance(found, FusedGpuModel), found
    scaled(loaded.model, loaded.model.model.layers[1].self_attn.q_proj, 1.1)
    reason = fuse_on_gpu(loaded.model, loaded.geometry, CpuBackend(), PlainRows())
    assert "follow their positions" in str(reason)


def test_latents_whose_expanded_keys_change_far_into_a_text_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_deepseek_v2.DeepseekV2Attention.expand_kv
    seen: list[Tensor] = []

    def other(self: nn.Module, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = own(self, latent, rotary)
        return keys, values * torch.where(seen[0] >= FAR, 1.5, 1.0).view(1, 1, -1, 1)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [kwargs["position_ids"]]

    monkeypatch.setattr(modeling_deepseek_v2.DeepseekV2Attention, "expand_kv", other)
    model = tiny_model("deepseek_v2-dense")
    model.model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.device("meta"):
        seen[:] = [torch.zeros(1, 1)]
    assert "its logits with cached latents differ" in wrap(model, None, "changed").geometry.expanded
