"""What transformers' modules take from the longest sequence, or from their cache's length, told by the step instead.

A step packs the new tokens of several sequences into one row, without transformers' cache. Two kinds of modules ask for
more than their positions: attention that scales its queries by how many tokens its cache holds (Llama 4's temperature),
and rotary embeddings that choose their factors by the largest position of the call (LongRoPE, arXiv:2402.13753).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.config import ModelGeometry


class _Before:
    """In the place of transformers' cache, for one layer of a step: how many tokens came before."""

    def __init__(self, step: Forward) -> None:
        batch = step.batch
        first = np.repeat(batch.starts - batch.rows[:-1], np.diff(batch.rows))
        self._before = torch.from_numpy(first.astype(np.int64)).to(step.pool.buffer.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """What a row's number is less than its position, ``int64 [rows]``."""
        return self._before

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The new rows as they are: the attention function stores them."""
        return keys, values


def tell_positions(model: nn.Module) -> None:
    """Let attention modules that count their cache's tokens know those of the step; again is harmless."""
    for module in model.modules():
        if counts_tokens(module) and _tell not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_tell, with_kwargs=True)


def counts_tokens(module: nn.Module) -> bool:
    """Whether an attention module's queries have a scale that follows the length of its cache."""
    return bool(getattr(module, "attn_temperature_tuning", False))


def _tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    step = kwargs.get("kvbits")
    if isinstance(step, Forward) and kwargs.get("past_key_values") is None:
        kwargs = {**kwargs, "past_key_values": _Before(step)}
    return args, kwargs


def switch_of(config: Any) -> int | None:
    """The length up to which a LongRoPE model of this (text) configuration takes its short factors; ``None``: it has
    none, or they are the long ones."""
    found = [
        int(part["original_max_position_embeddings"])
        for part in _rotary_parts(getattr(config, "rope_parameters", None))
        if part.get("rope_type") == "longrope" and part.get("long_factor") != part.get("short_factor")
    ]
    return min(found) if found and min(found) < config.max_position_embeddings else None


def _rotary_parts(parameters: Any) -> list[dict[str, Any]]:
    """Sets of rotary parameters: one, or one for each type of layers."""
    if not isinstance(parameters, dict):
        return []
    return [parameters, *(part for value in parameters.values() for part in _rotary_parts(value))]


class _Long:
    """In the place of a rotary module's ``forward``: it chooses by the largest position, so it gets one more, which is
    over its switch; so every token has the long factors, whatever else is in its step."""

    def __init__(self, module: nn.Module, switch: int) -> None:
        self.run = module.forward
        self._switch = switch

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        more = torch.nn.functional.pad(position_ids, (0, 1), value=self._switch)
        return tuple(table[:, :-1] for table in self.run(x, more, *args, **kwargs))


class Valued:
    """In the place of a rotary module's ``forward`` on ``meta``, where its code asks for the positions' values."""

    def __init__(self, module: Any) -> None:
        self._module, self._run = module, module.forward

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        try:
            found: tuple[Tensor, ...] = self._run(x, position_ids, *args, **kwargs)
            return found
        except RuntimeError:
            found = _tables(self._module, torch.zeros(position_ids.shape, device="cpu"), *args, **kwargs)
            return tuple(table.to("meta", x.dtype) for table in found)


def changes_factors(module: Any, switch: int) -> bool:
    """Whether a LongRoPE module turns a token otherwise in a call that goes beyond ``switch``; transformers' Phi-MoE
    does not."""
    if not isinstance(module.rope_type, str):  # factors by type of layer, which it is told
        return True
    tables = (_tables(module, torch.tensor([[1.0, last]])) for last in (1, switch))
    near, far = (torch.atan2(sin[0, 0], cos[0, 0]) for cos, sin in tables)
    return not torch.allclose(near, far)


def _tables(module: Any, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """What the module of ``module``'s kind gives that has memory, which it is made with."""
    with torch.device("cpu"):
        found: tuple[Tensor, ...] = type(module)(module.config)(torch.empty(1), position_ids.cpu(), *args, **kwargs)
    return found


def rope_types(module: Any) -> set[str]:
    """The kinds of a rotary module: one, or one for each type of layers; empty for another module."""
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else set() if kind is None else {kind}


def settle_rotary(model: Any, geometry: ModelGeometry) -> None:
    """Let a LongRoPE ``model`` have its long factors where ``geometry`` goes beyond its switch."""
    switch = switch_of(model.config.get_text_config(decoder=True))
    if switch is None or geometry.max_position <= switch:
        return
    for module in model.modules():
        if "longrope" in rope_types(module) and not isinstance(module.forward, _Long):
            module.forward = _Long(module, switch)
