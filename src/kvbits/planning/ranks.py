"""One rank of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import replace

from kvbits.config import LayerGeometry, ModelGeometry, StateShape
from kvbits.errors import ConfigError


def rank_geometry(geometry: ModelGeometry, ranks: int) -> ModelGeometry:
    """What one of ``ranks`` devices caches: heads are shared out, and KV heads too while there are enough of them.

    With fewer KV heads than ranks each head is stored by several ranks (Megatron-LM, arXiv:1909.08053, and every engine
    since); so is the one latent of multi-head latent attention. Recurrent states are shared out by heads and channels;
    what Mamba-2's few groups make every rank keep, 1 or 2 % of a state, is not counted again. Raises ``ConfigError``
    when the heads cannot be shared out evenly.
    """
    if ranks < 1:
        raise ConfigError(f"the tensor-parallel size is {ranks}; it must be positive")
    return replace(
        geometry,
        layers=tuple(_layer(geometry.name, g, ranks) for g in geometry.layers),
        states=tuple(_state(geometry.name, state, ranks) for state in geometry.states),
    )


def _state(name: str, state: StateShape, ranks: int) -> StateShape:
    heads, *rest = state.shape
    if heads % ranks:
        raise ConfigError(f"the state {state.shape} of layer {state.layer} of {name} is not for {ranks} ranks")
    return replace(state, shape=(heads // ranks, *rest))


def _layer(name: str, layer: LayerGeometry, ranks: int) -> LayerGeometry:
    kv_heads = layer.num_kv_heads
    if layer.num_heads % ranks:
        raise ConfigError(f"the {layer.num_heads} attention heads of {name} cannot be shared out over {ranks} ranks")
    if kv_heads % ranks and ranks % kv_heads:
        raise ConfigError(f"the {kv_heads} KV heads of {name} cannot be shared out over {ranks} ranks")
    return replace(layer, num_heads=layer.num_heads // ranks, num_kv_heads=max(1, kv_heads // ranks))
