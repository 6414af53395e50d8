"""The fused path: a transformers model whose layers have the common structure runs as one native call a step.

The structure is recognised by its parts (:mod:`kvbits.models.parts`), not by the model's name: norms before or after,
query, key and value projections (with a norm for each head or for all, or none), rotary embedding, sinks, output
projection, a gated MLP or a mixture of experts. What has any other part is left to transformers' own code. A model that
is recognised is run both ways once and must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.codecs import parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.decoder import Decoder, DecoderLayer, DecoderShape
from kvbits.kernels.experts import Gate
from kvbits.kernels.products import PackedWeight
from kvbits.models.packed import packed_weights
from kvbits.models.parts import Different, Rope, epsilon, expect, mlp, norm_weight, packed_weight, split
from kvbits.pool import PagedPool

_BODY = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_BLOCKS = frozenset({"self_attn", "mlp"})
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
"""Names of the norms before and after attention, before and after the MLP, as families have them."""

_ALL_NORMS = {name for names in _NORMS for name in names if name is not None}

_HEAD_NORMS = frozenset({"q_norm", "k_norm"})

_TRIED_TOKENS, _TRIED_MIXED = 16, PAGE_TOKENS - 1
"""How many tokens are tried, and how many where a router chooses: of few, chance would decide."""
_TOLERANCE, _TOLERANCE_WIDE = 0.05, 0.2
"""Relative difference of the logits, and where products round their inputs (SmolLM2 has 0.014 and 0.056: codes of
inputs that differ in their last bit may differ by one) or a router chooses (a last bit sends a token to another expert,
and later tokens see it: the tokens' median, in small models up to 0.1, float32 being as far from transformers' 16 bit);
a factor of two in one norm of a small model has over 0.3."""


@dataclass(frozen=True)
class FusedModel:
    """Embedding and rotary angles by the model's own modules, the rest native."""

    embedding: nn.Module
    rope: Rope
    decoder: Decoder

    def runs(self, step: Forward) -> bool:
        """Whether the step's backend is ours and has kernels for every layer of the pool."""
        backend = step.backend
        return isinstance(backend, CpuBackend) and None not in map(backend.layer, step.pool.layers)

    def forward(self, input_ids: Tensor, positions: Tensor, step: Forward, wanted: Tensor) -> Tensor:
        """As :meth:`kvbits.models.LoadedModel.forward`, for a step that :meth:`runs`."""
        assert isinstance(step.backend, CpuBackend)
        cos, sin = self.rope.tables(positions)
        embedded = self.embedding(input_ids)
        return self.decoder.forward(step.backend, step.pool.layers, step.batch, embedded, cos, sin, wanted)


def fuse(model: Any, geometry: ModelGeometry) -> FusedModel | str:
    """The fused version of a model whose layers are packed, or the reason why it has none."""
    if geometry.states:
        return "it has recurrent layers"
    try:
        fused = _recognise(model, geometry)
    except Different as reason:
        return str(reason)
    difference = _difference(model, geometry, fused)
    wide = fused.decoder.mixes or any(weight.weight_format.rounds_inputs for _, weight in packed_weights(model))
    if not difference < (_TOLERANCE_WIDE if wide else _TOLERANCE):
        return f"its logits differ by {difference:.2g} from transformers' own code"
    return fused


def _recognise(model: Any, geometry: ModelGeometry) -> FusedModel:
    body, head = model.get_decoder(), model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    expect(body, _BODY)
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in geometry.layers}
    if len(shapes) != 1:
        raise Different("its layers differ in shape")
    heads, kv_heads, key_dim, value_dim = shapes.pop()
    if key_dim != value_dim:
        raise Different("its keys and values differ in size")
    types = getattr(config, "layer_types", None)
    rope = Rope.of(body.rotary_emb, types)
    tables = [rope.table(types[i] if types else None) for i in range(len(body.layers))]
    found = [_layer(*parts) for parts in zip(body.layers, geometry.layers, tables, strict=True)]
    layers = [layer for layer, _, _ in found]
    shape = DecoderShape(
        hidden=layers[0].query.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=key_dim,
        rotated=rope.tables(torch.zeros(1, dtype=torch.long))[0].shape[-1],
        eps=_one({epsilon(body.norm)}.union(*(eps for _, _, eps in found)), "norms differ in epsilon"),
        gate=_one({gate for _, gate, _ in found if gate is not None} or {Gate()}, "MLPs differ in activation"),
        soft_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )
    return FusedModel(body.embed_tokens, rope, Decoder(shape, layers, norm_weight(body.norm), packed_weight(head)))


def _layer(layer: Any, geometry: LayerGeometry, table: int) -> tuple[DecoderLayer, Gate | None, set[float]]:
    """A layer, the gate of its dense MLP, and what its norms add."""
    children = {name for name, _ in layer.named_children()}
    names = next((names for names in _NORMS if set(names) - {None} == children & _ALL_NORMS), _NORMS[0])
    expect(layer, _BLOCKS | {name for name in names if name is not None})
    attention = layer.self_attn
    query, key, value = _projections(attention, geometry)
    own = dict(attention.named_parameters(recurse=False))
    if set(own) != ({"sinks"} if geometry.sinks else set()):
        raise Different(f"{type(attention).__name__} differs in {', '.join(own) or 'sinks'}")
    norms = [None if name is None else getattr(layer, name) for name in names]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    before, after_attention, before_mlp, after_mlp, of_query, of_key = (
        None if norm is None else norm_weight(norm) for norm in norms
    )
    blocks, gate = mlp(layer.mlp)
    made = DecoderLayer(
        query,
        key,
        value,
        packed_weight(attention.o_proj),
        blocks,
        input_norm=before,
        attention_norm=after_attention,
        mlp_norm=before_mlp,
        output_norm=after_mlp,
        query_norm=of_query,
        key_norm=of_key,
        sinks=own["sinks"].detach().float().contiguous() if own else None,
        rope=table,
    )
    _check_head_norm(made.query_norm, geometry.num_heads, geometry)
    _check_head_norm(made.key_norm, geometry.num_kv_heads, geometry)
    return made, gate, {epsilon(norm) for norm in norms if norm is not None}


def _projections(attention: Any, geometry: LayerGeometry) -> list[PackedWeight]:
    if hasattr(attention, "qkv_proj"):
        expect(attention, frozenset({"qkv_proj", "o_proj"}), _HEAD_NORMS)
        heads = geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads
        return split(attention.qkv_proj, [count * geometry.key_dim for count in heads])
    names = ("q_proj", "k_proj", "v_proj")
    expect(attention, frozenset({*names, "o_proj"}), _HEAD_NORMS)
    return [packed_weight(getattr(attention, name)) for name in names]


def _check_head_norm(norm: Tensor | None, heads: int, geometry: LayerGeometry) -> None:
    if norm is not None and len(norm) not in (geometry.key_dim, heads * geometry.key_dim):
        raise Different(f"a norm of {len(norm)} elements is neither of one head nor of all")


def _one(found: set[Any], what: str) -> Any:
    if len(found) != 1:
        raise Different(f"its {what}")
    return found.pop()


@torch.inference_mode()
def _difference(model: Any, geometry: ModelGeometry, fused: FusedModel) -> float:
    """Relative difference of the logits of both paths, each with a small 16-bit cache of its own."""
    generator = torch.Generator().manual_seed(0)
    count = _TRIED_MIXED if fused.decoder.mixes else _TRIED_TOKENS
    ids = torch.randint(geometry.vocab_size, (count,), generator=generator)
    positions = torch.arange(count)
    wanted = torch.arange(count)
    fast = fused.forward(ids, positions, _step(geometry, count), wanted)
    plain = (
        model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted,
            kvbits=_step(geometry, count),
        )
        .logits[0]
        .float()
    )
    if fused.decoder.mixes:
        return float(((fast - plain).norm(dim=1) / plain.norm(dim=1)).median())
    return float((fast - plain).norm() / plain.norm())


def _step(geometry: ModelGeometry, count: int) -> Forward:
    """A step that stores ``count`` tokens as the first of a sequence."""
    pool = PagedPool.smallest(geometry, parse_policy("bf16", geometry.num_layers))
    own = list(range(pool.layout.open.frames))
    return Forward(pool, CpuBackend(), BatchLayout.of([SequencePages(0, count, (), own, own)]))
