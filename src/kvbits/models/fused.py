"""The fused path: a transformers model whose layers have the common structure runs as one native call a step.

The structure is recognised by its parts, not by the model's name: norm, query, key and value projections (with a norm
for each head or not), rotary embedding, output projection, norm, gated MLP. What has any other part is left to
transformers' own code. A model that is recognised is run both ways once and must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.codecs import parse_policy
from kvbits.config import ModelGeometry
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.decoder import Decoder, DecoderLayer, DecoderShape
from kvbits.kernels.products import PackedWeight
from kvbits.models.packed import PackedLinear, packed_weights
from kvbits.pool import PagedPool

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_HEAD_NORMS = frozenset({"q_norm", "k_norm"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_LAYER = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_BODY = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})

_TRIED_TOKENS = 16
_TOLERANCE, _TOLERANCE_BITS = 0.05, 0.2
"""Relative difference of the logits, and where products round their inputs: SmolLM2 has 0.014 and 0.056 (codes of
inputs that differ in their last bit may differ by one); a factor of two in one norm of a small model has over 0.3."""


@dataclass(frozen=True)
class FusedModel:
    """Embedding and rotary angles by the model's own modules, the rest native."""

    embedding: nn.Module
    rotary: nn.Module
    decoder: Decoder

    def runs(self, step: Forward) -> bool:
        """Whether the step's backend is ours and has kernels for every layer of the pool."""
        backend = step.backend
        return isinstance(backend, CpuBackend) and None not in map(backend.layer, step.pool.layers)

    def forward(self, input_ids: Tensor, positions: Tensor, step: Forward, wanted: Tensor) -> Tensor:
        """As :meth:`kvbits.models.LoadedModel.forward`, for a step that :meth:`runs`."""
        assert isinstance(step.backend, CpuBackend)
        cos, sin = self.rotary(torch.empty(1), positions.unsqueeze(0))
        embedded = self.embedding(input_ids)
        return self.decoder.forward(step.backend, step.pool.layers, step.batch, embedded, cos[0], sin[0], wanted)


def fuse(model: Any, geometry: ModelGeometry) -> FusedModel | str:
    """The fused version of a model whose layers are packed, or the reason why it has none."""
    try:
        fused = _recognise(model, geometry)
    except _Different as reason:
        return str(reason)
    difference = _difference(model, geometry, fused)
    rounded = any(weight.weight_format.rounds_inputs for _, weight in packed_weights(model))
    if not difference < (_TOLERANCE_BITS if rounded else _TOLERANCE):
        return f"its logits differ by {difference:.2g} from transformers' own code"
    return fused


class _Different(Exception):
    """What the model has that the fused path has not."""


def _recognise(model: Any, geometry: ModelGeometry) -> FusedModel:
    body, head = model.get_decoder(), model.get_output_embeddings()
    _expect(body, _BODY, frozenset())
    if any(layer.sinks for layer in geometry.layers):
        raise _Different("its attention has sinks")
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in geometry.layers}
    if len(shapes) != 1:
        raise _Different("its layers differ in shape")
    heads, kv_heads, key_dim, value_dim = shapes.pop()
    if key_dim != value_dim:
        raise _Different("its keys and values differ in size")
    layers = [_layer(layer) for layer in body.layers]
    with torch.inference_mode():
        rotated = body.rotary_emb(torch.empty(1), torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
    first = body.layers[0]
    shape = DecoderShape(
        hidden=layers[0].query.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=key_dim,
        rotated=rotated,
        intermediate=layers[0].gate.out_features,
        eps=_eps(first.input_layernorm),
        activation=_activation(first.mlp.act_fn),
    )
    decoder = Decoder(shape, layers, _norm(body.norm), _weight(head))
    return FusedModel(body.embed_tokens, body.rotary_emb, decoder)


def _layer(layer: nn.Module) -> DecoderLayer:
    _expect(layer, _LAYER, frozenset())
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    _expect(attention, _ATTENTION, _HEAD_NORMS)
    _expect(mlp, _MLP, frozenset())
    return DecoderLayer(
        query=_weight(attention.q_proj),
        key=_weight(attention.k_proj),
        value=_weight(attention.v_proj),
        output=_weight(attention.o_proj),
        gate=_weight(mlp.gate_proj),
        up=_weight(mlp.up_proj),
        down=_weight(mlp.down_proj),
        input_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
    )


def _expect(module: nn.Module, needed: frozenset[str], allowed: frozenset[str]) -> None:
    found = {name for name, _ in module.named_children()}
    odd = sorted((needed - found) | (found - needed - allowed))
    if odd:
        raise _Different(f"{type(module).__name__} differs in {', '.join(odd)}")


def _weight(layer: Any) -> PackedWeight:
    if not isinstance(layer, PackedLinear):
        raise _Different(f"a linear layer ({type(layer).__name__}) is not packed")
    return layer.weight


def _norm(module: Any) -> Tensor:
    if {name for name, _ in module.named_parameters()} != {"weight"}:
        raise _Different(f"{type(module).__name__} is not a plain root mean square norm")
    weight: Tensor = module.weight.detach().float().contiguous()
    return weight


def _eps(module: Any) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    raise _Different(f"{type(module).__name__} names no epsilon")


def _activation(module: nn.Module) -> str:
    """By what it does: ``silu`` or ``gelu_tanh``."""
    x = torch.linspace(-4, 4, 33)
    with torch.inference_mode():
        y = module(x)
    if torch.allclose(y, nn.functional.silu(x), atol=1e-6):
        return "silu"
    if torch.allclose(y, nn.functional.gelu(x, approximate="tanh"), atol=1e-6):
        return "gelu_tanh"
    raise _Different(f"its activation is {type(module).__name__}")


@torch.inference_mode()
def _difference(model: Any, geometry: ModelGeometry, fused: FusedModel) -> float:
    """Relative difference of the logits of both paths, each with a small 16-bit cache of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(geometry.vocab_size, (_TRIED_TOKENS,), generator=generator)
    positions = torch.arange(_TRIED_TOKENS)
    wanted = torch.arange(_TRIED_TOKENS)
    fast = fused.forward(ids, positions, _step(geometry), wanted)
    plain = (
        model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted,
            kvbits=_step(geometry),
        )
        .logits[0]
        .float()
    )
    return float((fast - plain).norm() / plain.norm())


def _step(geometry: ModelGeometry) -> Forward:
    """A step that stores the tried tokens as the first of a sequence."""
    pool = PagedPool.smallest(geometry, parse_policy("bf16", geometry.num_layers))
    own = list(range(pool.layout.open.frames))
    return Forward(pool, CpuBackend(), BatchLayout.of([SequencePages(0, _TRIED_TOKENS, (), own, own)]))
