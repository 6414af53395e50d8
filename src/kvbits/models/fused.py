"""The fused path: a transformers model whose layers have the common structure runs as one native call a step.

What has another structure (:mod:`kvbits.models.structure`) is left to transformers' own code. A model that is
recognised is run both ways once and must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.config import PAGE_TOKENS, ModelGeometry
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.decoder import Decoder
from kvbits.kernels.products import PackedWeight
from kvbits.models.packed import PackedLinear, packed_weights
from kvbits.models.parts import Different, Rope
from kvbits.models.structure import recognise
from kvbits.models.trial import disagreement

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
    try:
        found = recognise(model, geometry, _packed_weight)
    except Different as reason:
        return str(reason)
    fused = FusedModel(found.embedding, found.rope, Decoder(found.shape, found.layers, found.norm, found.head))
    mixes = fused.decoder.mixes
    wide = mixes or any(weight.weight_format.rounds_inputs for _, weight in packed_weights(model))
    count, tolerance = _TRIED_MIXED if mixes else _TRIED_TOKENS, _TOLERANCE_WIDE if wide else _TOLERANCE
    return disagreement(model, geometry, fused.forward, CpuBackend(), count, tolerance, median=mixes) or fused


def _packed_weight(layer: Any) -> PackedWeight:
    if not isinstance(layer, PackedLinear):
        raise Different(f"a linear layer ({type(layer).__name__}) is not packed")
    return layer.weight
