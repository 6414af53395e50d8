"""Which parts a transformers model's layers have: recognised by what they are, not by the model's name.

Norms before or after a block, query, key and value projections (with a norm for each head or for all, or none), rotary
embedding, sinks, output projection, a gated MLP or a mixture of experts. Whatever else there is raises
:class:`kvbits.models.parts.Different`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor, nn

from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels.decoder import DecoderLayer, DecoderShape
from kvbits.kernels.experts import Gate
from kvbits.models.parts import Different, Rope, W, Weigh, epsilon, expect, mlp, norm_weight, split
from kvbits.models.positions import counts_tokens

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


@dataclass(frozen=True)
class Structure(Generic[W]):
    """What a fused decoder is made of: embedding and rotary angles by the model's own modules, norms as ``float32``."""

    embedding: nn.Module
    rope: Rope
    shape: DecoderShape
    layers: list[DecoderLayer[W]]
    norm: Tensor
    head: W


def recognise(model: Any, geometry: ModelGeometry, weigh: Weigh[W]) -> Structure[W]:
    """The parts of ``model``. Raises :class:`kvbits.models.parts.Different` for any other part."""
    if geometry.states:
        raise Different("it has recurrent layers")
    if geometry.shared:
        raise Different("its layers share keys and values")
    if any(layer.chunked for layer in geometry.layers):
        raise Different("it attends in chunks")
    if any(map(counts_tokens, model.modules())):
        raise Different("its queries' scale follows its cache's length")
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
    found = [_layer(*parts, weigh) for parts in zip(body.layers, geometry.layers, tables, strict=True)]
    layers = [layer for layer, _, _ in found]
    shape = DecoderShape(
        hidden=layers[0].query.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=key_dim,
        rotated=rope.rotated,
        eps=_one({epsilon(body.norm)}.union(*(eps for _, _, eps in found)), "norms differ in epsilon"),
        gate=_one({gate for _, gate, _ in found if gate is not None} or {Gate()}, "MLPs differ in activation"),
        soft_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )
    return Structure(body.embed_tokens, rope, shape, layers, norm_weight(body.norm), weigh(head))


def _layer(
    layer: Any, geometry: LayerGeometry, table: int, weigh: Weigh[W]
) -> tuple[DecoderLayer[W], Gate | None, set[float]]:
    """A layer, the gate of its dense MLP, and what its norms add."""
    children = {name for name, _ in layer.named_children()}
    names = next((names for names in _NORMS if set(names) - {None} == children & _ALL_NORMS), _NORMS[0])
    expect(layer, _BLOCKS | {name for name in names if name is not None})
    attention = layer.self_attn
    query, key, value = _projections(attention, geometry, weigh)
    own = dict(attention.named_parameters(recurse=False))
    if set(own) != ({"sinks"} if geometry.sinks else set()):
        raise Different(f"{type(attention).__name__} differs in {', '.join(own) or 'sinks'}")
    norms = [None if name is None else getattr(layer, name) for name in names]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    before, after_attention, before_mlp, after_mlp, of_query, of_key = (
        None if norm is None else norm_weight(norm) for norm in norms
    )
    blocks, gate = mlp(layer.mlp, weigh)
    made = DecoderLayer(
        query,
        key,
        value,
        weigh(attention.o_proj),
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


def _projections(attention: Any, geometry: LayerGeometry, weigh: Weigh[W]) -> list[W]:
    if hasattr(attention, "qkv_proj"):
        expect(attention, frozenset({"qkv_proj", "o_proj"}), _HEAD_NORMS)
        heads = geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads
        return split(weigh(attention.qkv_proj), [count * geometry.key_dim for count in heads])
    names = ("q_proj", "k_proj", "v_proj")
    expect(attention, frozenset({*names, "o_proj"}), _HEAD_NORMS)
    return [weigh(getattr(attention, name)) for name in names]


def _check_head_norm(norm: Tensor | None, heads: int, geometry: LayerGeometry) -> None:
    if norm is not None and len(norm) not in (geometry.key_dim, heads * geometry.key_dim):
        raise Different(f"a norm of {len(norm)} elements is neither of one head nor of all")


def _one(found: set[Any], what: str) -> Any:
    if len(found) != 1:
        raise Different(f"its {what}")
    return found.pop()
