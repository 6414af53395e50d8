"""The fused path on GPUs: torch's products, and kernels of our own for all that lies between them.

What runs fused is what has the structure of :mod:`kvbits.models.structure` with a dense MLP, in plain linear layers.
Projections of the same rows are one product each: their weights are joined, and the model's own become views of the
joined ones. Everything that a step reads is made here once, or in the step itself, so that a device can record it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.config import ModelGeometry
from kvbits.kernels import Backend, default_backend
from kvbits.kernels.decoder import DecoderLayer, DecoderShape, Mlp
from kvbits.kernels.triton.elementwise import add_norm, gated, turned
from kvbits.kernels.triton.launch import Launch, run
from kvbits.models.parts import Different, Rope
from kvbits.models.structure import Structure, recognise
from kvbits.models.trial import disagreement

_TRIED_TOKENS = 8
_TOLERANCES = {torch.bfloat16: 0.02, torch.float32: 0.002}
"""Relative difference of the logits times the root of the number of layers, whose roundings add up as noise, by the
types of weights that run fused. In bfloat16 Qwen3's shape with random weights has 0.013 of 3 layers and 0.044 of 36."""


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a linear layer."""

    layer: nn.Linear
    first: int
    out_features: int

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    def part(self, first: int, count: int) -> Outputs:
        return Outputs(self.layer, self.first + first, count)


@dataclass(frozen=True)
class Linear:
    """``weight`` ``[out, in]`` and ``bias`` ``[out]``, in the memory of the model's own."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class GpuLayer:
    """``parts`` gives the norms, sinks and rotary table."""

    parts: DecoderLayer[Outputs]
    inputs: Linear
    """Queries, keys and values."""
    output: Linear
    gates: Linear
    """Gates and ups."""
    down: Linear


@dataclass(frozen=True)
class FusedGpuModel:
    """Embedding and rotary angles by the model's own modules."""

    embedding: nn.Module
    rope: Rope
    shape: DecoderShape
    layers: tuple[GpuLayer, ...]
    norm: Tensor
    head: Linear
    launch: Launch

    def runs(self, step: Forward) -> bool:
        """Whether the step's cache is where the weights are."""
        return step.pool.buffer.device == self.norm.device

    def forward(self, input_ids: Tensor, positions: Tensor, step: Forward, wanted: Tensor) -> Tensor:
        """As :meth:`kvbits.models.LoadedModel.forward`, for a step that :meth:`runs`."""
        input_ids, positions, wanted = (x.to(self.norm.device) for x in (input_ids, positions, wanted))
        angles = self.rope.tables(positions)
        x, delta, after = self.embedding(input_ids), None, None
        for index, layer in enumerate(self.layers):
            parts = layer.parts
            attended = self._attend(index, layer, self._norm(x, delta, after, parts.input_norm), angles, step)
            if layer is self.layers[-1]:
                x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
            rows = self._norm(x, layer.output(attended), parts.attention_norm, parts.mlp_norm)
            delta = layer.down(gated(self.launch, layer.gates(rows), self.shape.gate.activation))
            after = parts.output_norm
        logits = self.head(self._norm(x, delta, after, self.norm)).float()
        cap = self.shape.soft_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _norm(self, x: Tensor, delta: Tensor | None, after: Tensor | None, before: Tensor | None) -> Tensor:
        return add_norm(self.launch, x, delta, after, before, self.shape.eps)

    def _attend(
        self, index: int, layer: GpuLayer, rows: Tensor, angles: tuple[Tensor, Tensor], step: Forward
    ) -> Tensor:
        parts, shape = layer.parts, self.shape
        cos, sin = (table[parts.rope] for table in angles)
        norms = parts.query_norm, parts.key_norm
        sides = turned(self.launch, layer.inputs(rows), shape.heads, shape.kv_heads, norms, cos, sin, shape.eps)
        return step.run(index, *sides, parts.sinks).flatten(1)


def fuse_on_gpu(
    model: Any, geometry: ModelGeometry, backend: Backend | None = None, launch: Launch = run
) -> FusedGpuModel | str:
    """The fused version of a model, or the reason why it has none; ``backend`` attends when it is tried."""
    try:
        structure = recognise(model, geometry, _plain)
        _check(structure)
    except Different as reason:
        return str(reason)
    fused = _join(structure, launch)
    tolerance = _TOLERANCES[structure.head.layer.weight.dtype] * len(fused.layers) ** 0.5
    try:
        attends = backend or default_backend(str(model.device))
        different = disagreement(model, geometry, fused.forward, attends, _TRIED_TOKENS, tolerance)
    # a kernel that does not compile here: transformers' own code runs without
    except Exception as error:
        return f"it cannot be tried: {type(error).__name__}: {error}"
    return different or fused


def _plain(layer: Any) -> Outputs:
    if type(layer) is not nn.Linear:
        raise Different(f"a linear layer ({type(layer).__name__}) is not a plain one")
    return Outputs(layer, 0, layer.out_features)


def _check(structure: Structure[Outputs]) -> None:
    weights = [structure.head.layer.weight]
    for parts in structure.layers:
        assert isinstance(parts.mlp, Mlp), parts.mlp  # experts have no plain linear layers
        mlp = parts.mlp
        found = parts.query, parts.key, parts.value, parts.output, mlp.gate, mlp.up, mlp.down
        weights += [outputs.layer.weight for outputs in found]
    if len({(weight.dtype, weight.device) for weight in weights}) != 1:
        raise Different("its weights differ in type or device")
    if weights[0].dtype not in _TOLERANCES:
        raise Different(f"its weights are {weights[0].dtype}")


@torch.no_grad()
def _join(structure: Structure[Outputs], launch: Launch) -> FusedGpuModel:
    layers = []
    for parts in structure.layers:
        assert isinstance(parts.mlp, Mlp), parts.mlp
        inputs = _joined((parts.query, parts.key, parts.value))
        gates = _joined((parts.mlp.gate, parts.mlp.up))
        layers.append(GpuLayer(parts, inputs, _joined((parts.output,)), gates, _joined((parts.mlp.down,))))
    device = structure.norm.device
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # pieces that were freed, too small for anything else
    head = _joined((structure.head,))
    return FusedGpuModel(
        structure.embedding, structure.rope, structure.shape, tuple(layers), structure.norm, head, launch
    )


def _joined(parts: Sequence[Outputs]) -> Linear:
    """One linear layer of all ``parts``, in whose memory theirs lie from now on."""
    layers = list(dict.fromkeys(part.layer for part in parts))
    if len(layers) == 1:
        bias = layers[0].bias
        return Linear(layers[0].weight.detach(), None if bias is None else bias.detach())
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    for layer, own in zip(layers, weight.split(sizes), strict=True):
        layer.weight.data = own
    if all(layer.bias is None for layer in layers):
        return Linear(weight, None)
    joined = weight.new_zeros(len(weight))
    for layer, part in zip(layers, joined.split(sizes), strict=True):
        if layer.bias is not None:
            layer.bias.data = part.copy_(layer.bias)
    return Linear(weight, joined)
