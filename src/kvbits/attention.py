"""A token's way through the cache: the function that a Hugging Face attention layer calls.

The layer hands over its query, key and value after the position embedding; the step's context travels as the model
keyword ``kvbits`` (a :class:`Forward`), so there is no global state. The rows of all sequences of a step lie packed in
one batch row of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.config import LayerGeometry
from kvbits.errors import UnsupportedError
from kvbits.kernels import Backend, BatchLayout
from kvbits.kernels.op import attend_paged, enlist
from kvbits.pool import PagedPool

IMPLEMENTATION = "kvbits"
"""The name under which :func:`attend` is registered with transformers' ``AttentionInterface``."""

_HANDLED = frozenset({"kvbits", "dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"})
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "position_embeddings"}
)


class Latents(ABC):
    """What stands in the place of ``expand_kv`` of an attention layer whose keys and values are one latent each token.

    Attention then runs in the latents' space (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): a head's part of the
    projection that would expand the latents to keys meets its queries, the part for values what it attended to.
    """

    @abstractmethod
    def queries(self, query: Tensor) -> Tensor:
        """``[rows, heads, head_dim]`` into the space of latents and rotary keys, ``[rows, heads, key_dim]``."""

    @abstractmethod
    def outputs(self, latent: Tensor) -> Tensor:
        """Sums of latents ``[rows, heads, value_dim]`` as each head's output, ``[rows, heads, head_dim]``."""


@dataclass(frozen=True)
class Forward:
    """One step: where the cache lies, who reads it, and which rows belong to which sequence."""

    pool: PagedPool
    backend: Backend
    batch: BatchLayout
    number: int = field(init=False, compare=False)
    """Its name for the operator."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", enlist(self))

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """Store and attend in the model's layer ``layer`` (:meth:`kvbits.kernels.Backend.forward`)."""
        geometry = self.pool.geometry
        batch = self._unfinished if geometry.read_again(layer) else self.batch
        return self.backend.forward(self.pool.layers[geometry.index_of(layer)], batch, query, key, value, sinks)

    @cached_property
    def _unfinished(self) -> BatchLayout:
        return replace(self.batch, again=True)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Store ``key`` and ``value`` and attend to the cache.

    ``query`` ``[1, heads, rows, key_dim]``, ``key`` and ``value`` ``[1, kv_heads, rows, dim]``. Returns ``[1, rows,
    heads, value_dim]``. Where a layer caches latents, ``key`` is a latent and the rotary key, ``value`` the latent, and
    ``query`` and result are those of expanded heads. Raises ``UnsupportedError`` for a keyword that asks for something
    else than what the cache was laid out for; nothing is dropped.
    """
    step: Forward | None = kwargs.get("kvbits")
    if step is None:
        raise UnsupportedError("the model was called without kvbits=Forward(...); use kvbits.LLM to run it")
    place: Any = module.layer_idx
    view = step.pool.layers[step.pool.geometry.index_of(place)]
    _check(view.geometry, query.shape[3], attention_mask, kwargs)
    sinks = kwargs.get("s_aux")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    sinks = None if sinks is None else sinks.float()
    latents: Any = module.expand_kv if view.geometry.latent else None
    query = query if latents is None else latents.queries(query)
    if torch.compiler.is_compiling():
        out = attend_paged(query, key, value, sinks, step.pool.buffer, step.number, place)
    else:
        out = step.run(place, query, key, value, sinks)
    return (out if latents is None else latents.outputs(out)).unsqueeze(0), None


def refuse_keywords(kwargs: dict[str, Any]) -> None:
    """Raise ``UnsupportedError`` for a keyword of an attention call that kvbits has no meaning for."""
    for name, value in kwargs.items():
        if name not in _HANDLED and name not in _HARMLESS and value is not None and value is not False:
            raise UnsupportedError(f"the model passes '{name}' to its attention; kvbits does not implement it")
    if kwargs.get("dropout"):
        raise UnsupportedError(f"the model asks for attention dropout {kwargs['dropout']}; kvbits only infers")
    if kwargs.get("is_causal") is False:
        raise UnsupportedError("the model asks for bidirectional attention; kvbits is causal")


def _check(layer: LayerGeometry, query_dim: int, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse whatever the layer asks for and the cache's geometry does not say."""
    refuse_keywords(kwargs)
    scale = kwargs.get("scaling")
    window = None if layer.chunked else layer.window
    asked = {
        "scaling": (query_dim**-0.5 if scale is None else scale, layer.scale),
        # a layer that never names its window leaves it to its mask, which the geometry has measured
        "sliding_window": (kwargs.get("sliding_window", window), window),
        "softcap": (kwargs.get("softcap"), layer.softcap),
        "s_aux": (kwargs.get("s_aux") is not None, layer.sinks),
    }
    for name, (found, expected) in asked.items():
        if found != expected:
            raise UnsupportedError(f"the model asks for {name}={found}; its geometry says {expected}")
    if attention_mask is not None:
        raise UnsupportedError("the model passes an attention mask; kvbits masks by position")
