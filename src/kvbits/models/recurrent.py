"""Recurrent layers beside attention: gated delta rules, Mamba-2, short convolutions.

They run as transformers' own modules. A step packs the rows of several sequences into one, which a recurrent layer must
not mix: each sequence's rows pass through it alone, with transformers' own cache, whose tensors are a slot of the
:class:`~kvbits.pool.StatePool`; single next tokens pass as a batch. A layer is known by its parts (a short convolution,
a number, a cache among its arguments), measured on torch's ``meta`` device, and accepted if it goes on from its states
as it runs at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvbits.attention import Forward
from kvbits.config import ModelGeometry, StateShape
from kvbits.errors import UnsupportedError
from kvbits.kernels import BatchLayout
from kvbits.models.quiet import quiet
from kvbits.pool import StatePool

_CACHES = ("cache_params", "past_key_values")
"""What transformers' modules call their cache."""

_TRIED = 70
"""Rows on which a layer is tried: more than a chunk of its fast form."""

_BATCH = -1
"""Whose place in :attr:`kvbits.pool.StatePool.made` the cache of several sequences has."""

_CUTS = (33, 1, 1, 35)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}

Run = Callable[..., Tensor]


def mixers_of(model: nn.Module) -> dict[int, Any]:
    """The modules that carry a state from token to token, by the model's numbers of their layers."""
    found: dict[int, Any] = {}
    for module in model.modules():
        place = getattr(module, "layer_idx", None)
        if isinstance(place, int) and _convolution(module) is not None and cache_name(module) is not None:
            if place in found:
                raise UnsupportedError(f"layer {place} has two recurrent parts")
            found[place] = module
    return found


def cache_name(module: nn.Module) -> str | None:
    """What ``module`` calls its cache."""
    names = inspect.signature(type(module).forward).parameters
    return next((name for name in _CACHES if name in names), None)


def _convolution(module: nn.Module) -> nn.Conv1d | None:
    return next((child for child in module.children() if isinstance(child, nn.Conv1d)), None)


class Split:
    """In the place of a recurrent module's ``forward``: no sequence's rows meet another one's states."""

    def __init__(self, module: Any, config: Any) -> None:
        self.run: Run = module.forward
        self._layer: int = module.layer_idx
        self._name = cache_name(module) or ""
        self._config = config

    def __call__(self, hidden_states: Tensor, *args: Any, kvbits: Forward | None = None, **kwargs: Any) -> Tensor:
        """``hidden_states`` ``[1, rows, hidden]``, packed as in the step ``kvbits``; without one the module's own."""
        if kvbits is None:
            return self.run(hidden_states, *args, **kwargs)
        states = kvbits.pool.states
        if states is None:
            raise UnsupportedError(f"layer {self._layer} is recurrent; only kvbits' engine keeps its states")
        if args or kwargs.get("attention_mask") is not None:
            raise UnsupportedError(f"the model passes a mask to its recurrent layer {self._layer}")
        kwargs.pop(self._name, None)
        batch, out = kvbits.batch, torch.empty_like(hidden_states)
        assert len(batch.slots) == len(batch.starts), batch.slots
        together = _together(batch, states)
        if together:
            rows, slots = batch.rows[together], [batch.slots[number] for number in together]
            cache = _gathered(states, self._layer, slots, self._config)
            out[0, rows] = self.run(hidden_states[0, rows].unsqueeze(1), **{**kwargs, self._name: cache}).squeeze(1)
            _scatter(states, self._layer, slots, cache)
        for number in set(range(len(batch.slots))).difference(together):
            for first, end, cache, keep in self._pieces(batch, states, number):
                out[:, first:end] = self.run(hidden_states[:, first:end], **{**kwargs, self._name: cache})
                if states.converts(self._layer):
                    _scatter(states, self._layer, [batch.slots[number]], cache)
                if keep is not None:
                    states.copy_layer(self._layer, batch.slots[number], keep)
        return out

    def _pieces(
        self, batch: BatchLayout, states: StatePool, number: int
    ) -> Iterator[tuple[int, int, DynamicCache, int | None]]:
        """Rows of a sequence to run at once, the states they go on from, and the slot where these are kept then."""
        slot, converts = batch.slots[number], states.converts(self._layer)
        cache = (
            _gathered(states, self._layer, [slot], self._config) if converts else _cache_of(states, slot, self._config)
        )
        layer: Any = cache.layers[self._layer]
        first, end = int(batch.rows[number]), int(batch.rows[number + 1])
        trail, known = batch.trails[number], bool(batch.starts[number])
        guesses = end - len(trail)
        cuts = range(first + 1 if states.single else max(guesses, first + 1), end)
        for begin, stop in zip([first, *cuts], [*cuts, end], strict=True):
            layer.has_previous_state = dict.fromkeys(layer.has_previous_state, known)
            yield begin, stop, cache, trail[stop - guesses] if guesses <= stop < end else None
            known = True
            if converts and stop < end:
                cache = _gathered(states, self._layer, [slot], self._config)


def _together(batch: BatchLayout, states: StatePool) -> list[int]:
    """Sequences that go on by one token: a layer reads its weights once for all of them."""
    found = [] if states.single else np.flatnonzero((batch.counts == 1) & (batch.starts > 0)).tolist()
    return found if len(found) > 1 else []


def _cache_of(states: StatePool, slot: int, config: Any) -> DynamicCache:
    """transformers' cache whose tensors are those of ``slot``."""
    cache: DynamicCache | None = states.made.get(slot)
    if cache is None:
        cache = DynamicCache(config=config)
        for shape in states.geometry.states:
            _put(cache.layers[shape.layer], shape, states.state(slot, shape))
        states.made[slot] = cache
    return cache


def _put(layer: Any, shape: StateShape, tensor: Tensor) -> None:
    layer.device, number = tensor.device, shape.number
    if shape.kind == "conv":
        layer.dtype, layer.conv_states[number] = tensor.dtype, tensor
        layer.conv_kernel_size[number] = tensor.shape[-1]
        layer.is_conv_states_initialized[number] = True
    else:
        layer.recurrent_states[number] = tensor
        layer.is_recurrent_states_initialized[number] = True


def _gathered(states: StatePool, place: int, slots: list[int], config: Any) -> DynamicCache:
    """transformers' cache with copies of a layer's states in ``slots``, as a batch, in what the layer computes."""
    cache: DynamicCache = states.made.get(_BATCH) or DynamicCache(config=config)
    states.made[_BATCH] = cache
    layer: Any = cache.layers[place]
    for shape in states.of_layer(place):
        _put(layer, shape, torch.cat([states.state(slot, shape) for slot in slots]).to(states.computed(shape)))
    layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
    return cache


def _scatter(states: StatePool, place: int, slots: list[int], cache: DynamicCache) -> None:
    """Copy a layer's states back to ``slots``."""
    layer: Any = cache.layers[place]
    for shape in states.of_layer(place):
        kept = (layer.conv_states if shape.kind == "conv" else layer.recurrent_states)[shape.number]
        for row, slot in zip(kept.split(1), slots, strict=True):
            states.state(slot, shape).copy_(row)


def split(model: Any) -> None:
    """Let every recurrent layer of ``model`` keep sequences apart; again is harmless."""
    config = model.config.get_text_config(decoder=True)
    for module in mixers_of(model).values():
        if not isinstance(module.forward, Split):
            module.forward = Split(module, config)


def try_cuts(model: Any, geometry: ModelGeometry) -> None:
    """Run a recurrent layer of each kind. Raises ``UnsupportedError`` where results differ where rows are cut."""
    config = model.config.get_text_config(decoder=True)
    for module in {type(module): module for module in reversed(mixers_of(model).values())}.values():
        _check_cuts(module, [state for state in geometry.states if state.layer == module.layer_idx], config)


@torch.inference_mode()
def _check_cuts(module: Any, shapes: list[StateShape], config: Any) -> None:
    dtype = dtype_of(module)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _TRIED, config.hidden_size, generator=generator).to(dtype)
    rows = rows.to(next(module.parameters()).device)
    with quiet():  # about kernels of other packages
        whole = module.forward(rows)
        cache = DynamicCache(config=config)
        parts = [module.forward(part, **{cache_name(module) or "": cache}) for part in rows.split(_CUTS, dim=1)]
    found = _shapes(cache.layers[module.layer_idx], module.layer_idx, dtype)
    if found != [replace(shape, wide=shape.wide and dtype != torch.float32) for shape in shapes]:
        raise UnsupportedError(f"{type(module).__name__} keeps {found}; its geometry says {shapes}")
    difference = float((torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max())
    if not difference <= _TOLERANCE[dtype]:
        raise UnsupportedError(
            f"{type(module).__name__} does not go on from its states: results differ by {difference:.2g} where rows "
            "are cut"
        )


def dtype_of(module: Any) -> torch.dtype:
    """What a recurrent module computes in."""
    convolution = _convolution(module)
    assert convolution is not None
    return convolution.weight.dtype


def _shapes(layer: Any, place: int, dtype: torch.dtype) -> list[StateShape]:
    """The states that transformers' cache layer holds after a module of ``dtype`` ran."""
    kinds = (("conv", layer.conv_states), ("recurrent", layer.recurrent_states))
    found = []
    for kind, states in kinds:
        for number, state in states.items():
            if state is not None:
                wide = state.dtype == torch.float32 != dtype
                if not wide and state.dtype != dtype:
                    raise UnsupportedError(f"layer {place} keeps a state in {state.dtype}")
                found.append(StateShape(place, kind, number, tuple(state.shape[1:]), wide))
    return found


def note_states(model: Any, states: dict[int, list[StateShape]]) -> None:
    """Let recurrent layers of a ``model`` on ``meta`` note in ``states`` what they keep when it runs, in bfloat16."""
    config = model.config.get_text_config(decoder=True)
    for module in mixers_of(model).values():
        module.forward = _noted(module, config, states)


def _noted(module: Any, config: Any, states: dict[int, list[StateShape]]) -> Run:
    own, name = module.forward, cache_name(module) or ""

    def forward(hidden_states: Tensor, *_: Any, kvbits: Any = None, **__: Any) -> Tensor:
        cache, place = DynamicCache(config=config), module.layer_idx
        if kvbits is None:
            raise UnsupportedError(
                f"the recurrent layer {place} of this {config.model_type} model is not told of the step that it runs in"
            )
        if place in states or not isinstance(cache.layers[place], LinearAttentionCacheLayerMixin):
            raise UnsupportedError(f"layer {place} of this {config.model_type} model keeps its state in its own way")
        module.to(torch.bfloat16)
        out: Tensor = own(hidden_states.to(torch.bfloat16), **{name: cache})
        states[place] = _shapes(cache.layers[place], place, torch.bfloat16)
        return out.to(hidden_states.dtype)

    return forward
