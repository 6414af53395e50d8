"""Multi-head latent attention (MLA: DeepSeek-V2, arXiv:2405.04434, section 2.1) that caches its latents.

A token's keys and values are projections of one latent, and a rotary key that all heads share. transformers' layers
expand the latents just before attention, in a method of their own (``expand_kv``). Here that method hands latent and
rotary key over as they are, as the key of one head whose first channels are its value, and the projection goes to the
queries and to the outputs instead. Layers are known by their parts, and accepted if the model's logits are those of
expanded heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.attention import IMPLEMENTATION, Latents
from kvbits.config import PAGE_TOKENS, ModelGeometry
from kvbits.errors import UnsupportedError
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.products import Products
from kvbits.models.packed import PackedLinear
from kvbits.models.trial import differences, logits_of

_PARTS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "expand_kv")
_SIZES = ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_TRIED_TOKENS = PAGE_TOKENS - 1
_TOLERANCE = 0.1
"""Relative difference of a token's logits, the median of all (a last bit may send one to another expert). Small random
models in float32 have 0.01: 16-bit pages round latents, or what they are expanded to."""


class Absorbed(Latents):
    """``expand_kv`` of ``module``, which expands nothing while the model's attention is ``implementation``."""

    def __init__(self, module: Any, implementation: str) -> None:
        self._module = module
        self._implementation = implementation
        self._packed: tuple[list[PackedLinear], list[PackedLinear]] | None = None

    def __call__(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """``[1, 1, rows, kv_lora_rank]`` and ``[1, 1, rows, qk_rope_head_dim]`` as key and value of one head."""
        if self._module.config._attn_implementation == self._implementation:
            return torch.cat([latent, rotary], dim=-1), latent
        if self._module.kv_b_proj is None:
            raise UnsupportedError("this model was loaded for cached latents, and can no longer expand them to heads")
        expanded: tuple[Tensor, Tensor] = type(self._module).expand_kv(self._module, latent, rotary)
        return expanded

    @property
    def query_dim(self) -> int:
        """Of a head's query, as the layer gives it."""
        return int(self._module.qk_nope_head_dim + self._module.qk_rope_head_dim)

    @property
    def head_dim(self) -> int:
        """Of a head's expanded values."""
        return int(self._module.v_head_dim)

    def queries(self, query: Tensor) -> Tensor:
        plain, rotary = query.split([self._module.qk_nope_head_dim, self._module.qk_rope_head_dim], dim=-1)
        keys, _ = self._weights()
        return torch.cat([_by_head(plain, keys), rotary], dim=-1)

    def outputs(self, latent: Tensor) -> Tensor:
        _, values = self._weights()
        return _by_head(latent, values)

    def settle(self) -> None:
        """Take what is needed of a packed projection, and let go of the rest: heads cannot be expanded any more."""
        if isinstance(self._module.kv_b_proj, PackedLinear):
            self._weights()
            self._module.kv_b_proj = None

    def parts(self) -> list[PackedLinear]:
        """The packed projections of all heads; none where they are not packed."""
        self._weights()
        return [] if self._packed is None else [*self._packed[0], *self._packed[1]]

    def _weights(self) -> tuple[Tensor | list[PackedLinear], Tensor | list[PackedLinear]]:
        """Each head's projection of queries, ``[heads, kv_lora_rank, head_dim]``, and of outputs."""
        if self._packed is not None:
            return self._packed
        module, projection = self._module, self._module.kv_b_proj
        packed = isinstance(projection, PackedLinear)
        weight = projection.weight.unpack(torch.arange(projection.weight.out_features)) if packed else projection.weight
        sizes = [module.qk_nope_head_dim, module.v_head_dim]
        keys, values = weight.view(module.num_heads, sum(sizes), -1).split(sizes, dim=1)
        keys = keys.transpose(1, 2)
        if not packed:
            return keys, values
        self._packed = _pack(keys, projection.products), _pack(values, projection.products)
        return self._packed


def _pack(weights: Tensor, products: Products) -> list[PackedLinear]:
    return [PackedLinear(products.pack(weight.bfloat16().contiguous(), None), products) for weight in weights]


def _by_head(rows: Tensor, weights: Tensor | list[PackedLinear]) -> Tensor:
    """``[rows, heads, in]`` times each head's weight ``[out, in]``: ``[rows, heads, out]``."""
    if isinstance(weights, Tensor):
        return torch.einsum("rhi,hoi->rho", rows, weights)
    return torch.stack([weight(rows[:, head]) for head, weight in enumerate(weights)], dim=1)


def absorb(model: nn.Module, implementation: str = IMPLEMENTATION) -> str | None:
    """Let the layers of ``model`` that have latents hand them over; again is harmless. ``None``, or why they cannot."""
    modules = list(_modules(model))
    for module in modules:
        reason = _different(module)
        if reason is not None:
            return f"{type(module).__name__} {reason}"
    for module in modules:
        if not isinstance(module.expand_kv, Absorbed):
            module.expand_kv = Absorbed(module, implementation)
    return None


def release(model: nn.Module) -> None:
    """Undo :func:`absorb`."""
    for module in _modules(model):
        vars(module).pop("expand_kv", None)


def has_latents(model: nn.Module) -> bool:
    """Whether a layer of ``model`` makes latents, however they are cached."""
    return any(True for _ in _modules(model))


def absorbed(model: nn.Module) -> Iterator[Absorbed]:
    """What :func:`absorb` put into the layers of ``model``."""
    return (module.expand_kv for module in _modules(model) if isinstance(getattr(module, "expand_kv", 0), Absorbed))


def _modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "kv_a_proj_with_mqa"))


def _different(module: Any) -> str | None:
    """How an attention layer is not one whose latents can be cached."""
    missing = [name for name in (*_PARTS, *_SIZES, "layer_idx", "config") if not hasattr(module, name)]
    if missing:
        return f"has no {missing[0]}"
    heads, rank, plain, rotary, value = (getattr(module, name) for name in _SIZES)
    down, up = module.kv_a_proj_with_mqa, module.kv_b_proj
    if isinstance(up, PackedLinear) or up is None:  # it was looked at before
        return None
    if not isinstance(up, nn.Linear) or up.bias is not None:
        return "expands latents by something else than a plain linear layer"
    if (up.in_features, up.out_features) != (rank, heads * (plain + value)):
        return f"expands latents from {up.in_features} to {up.out_features}, not {rank} to {heads * (plain + value)}"
    if getattr(down, "out_features", rank + rotary) != rank + rotary:
        return f"makes latents of {down.out_features}, not {rank} + {rotary}"
    return None


@torch.inference_mode()
def difference(model: Any, geometry: ModelGeometry, expanded: ModelGeometry) -> float:
    """Relative difference of the logits with cached latents (``geometry``) from those with ``expanded`` heads, the
    median of some tokens near a text's beginning or of some far ones, whichever is more."""
    release(model)
    plain = logits_of(model, expanded, CpuBackend(), _TRIED_TOKENS)
    absorb(model)
    found = logits_of(model, geometry, CpuBackend(), _TRIED_TOKENS)
    return max(differences(found, plain, _TRIED_TOKENS, median=True))


def differing(model: Any, geometry: ModelGeometry, expanded: ModelGeometry) -> str | None:
    """``None``, or how the logits with cached latents differ; then the model expands them again."""
    found = difference(model, geometry, expanded)
    if found < _TOLERANCE:
        return None
    release(model)
    return f"its logits with cached latents differ by {found:.2g}"
