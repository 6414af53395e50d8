"""The attention function that a model gets when a :class:`~kvbits.hf.cache.QuantizedCache` is made for it.

transformers gives an attention function the keys and values that ``cache.update`` returned, and a mask, but not the
cache. So the keys travel as :class:`CachedKeys`, a tensor that knows the step it belongs to: no global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvbits.attention import attend
from kvbits.errors import UnsupportedError

if TYPE_CHECKING:
    from kvbits.hf.cache import QuantizedCache

IMPLEMENTATION = "kvbits-cache"
"""The name under which :func:`attend_cached` is registered; the engine's own attention has another one."""

_BASE: Any = Tensor._base.__get__  # type: ignore[union-attr]
_KERNEL_DTYPES = (torch.bfloat16, torch.float32)


class CachedKeys(Tensor):
    """New keys on their way from ``update`` to the attention; what is computed from them (latent attention expands
    them) is marked as well.
    """

    cache: QuantizedCache

    @classmethod
    def of(cls, keys: Tensor, cache: QuantizedCache) -> CachedKeys:
        """``keys`` themselves (the memory is shared), marked as belonging to ``cache``."""
        marked = keys.as_subclass(cls)
        marked.cache = cache
        return marked

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # The tensor of which one is a view is not computed from it; torch.compile asks for it again and again.
        if func == _BASE:
            return result
        marked = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(a, cls)]
        if not marked:
            return result
        cache = marked[0].cache
        if isinstance(result, (list, tuple)):
            return type(result)(cls.of(r, cache) if type(r) is Tensor else r for r in result)
        return cls.of(result, cache) if type(result) is Tensor else result


def register() -> None:
    """Make attention and mask known to transformers; again is harmless."""
    AttentionInterface.register(IMPLEMENTATION, attend_cached)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)


def padding_mask(*, kv_length: int, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """In the place of a mask: which tokens are real, ``bool [batch, 1, 1, kv_length]``, or ``None`` when all are.

    Causality and windows are the kernels' business: :func:`kvbits.models.geometry_of` has measured them.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, None, None, :kv_length]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_cached(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Store the step's ``key`` and ``value`` in the cache's pages and attend to them.

    ``query`` ``[batch, heads, asked, key_dim]``, ``key``, ``value`` ``[batch, kv_heads, tokens, dim]``: new tokens
    only, of which a layer that stores nothing may ask for the last; ``attention_mask`` ``bool [batch, 1, 1, cached +
    tokens]`` or ``None``. Returns ``[batch, asked, heads, value_dim]``, zeros for padding. Raises ``UnsupportedError``
    for what the cache cannot express.
    """
    if not isinstance(key, CachedKeys):
        why = "; transformers drops it in training mode with gradient checkpointing" if module.training else ""
        raise UnsupportedError(
            "this model's attention was switched by kvbits.hf.QuantizedCache, and the call brought no such cache"
            f"{why}: pass past_key_values=cache, or switch back with model.set_attn_implementation('sdpa')"
        )
    index: Any = module.layer_idx
    cache = key.cache
    cache.check_shapes(index, key, value)
    asked = query.shape[2]
    if asked < key.shape[2]:
        query = nn.functional.pad(query, (0, 0, key.shape[2] - asked, 0))
    dtype = query.dtype if query.dtype in _KERNEL_DTYPES else torch.float32
    packed = [_rows(x, dtype) for x in (query, key, value)]
    heads, width = query.shape[1], value.shape[3]
    out = query.new_zeros(query.shape[0] * query.shape[2], heads, width)
    with cache.step(index, query.shape[0], query.shape[2], _padding(attention_mask)) as parts:
        for part in parts:
            rows = packed if part.rows is None else [x[part.rows] for x in packed]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in rows)
            result = attend(module, q, k, v, None, **{**kwargs, "kvbits": part.forward})[0][0].to(out.dtype)
            if part.rows is None:
                out = result
            else:
                out[part.rows] = result
    return out.view(query.shape[0], query.shape[2], heads, width)[:, -asked:], None


def _padding(mask: Tensor | None) -> Tensor | None:
    """What :func:`padding_mask` gave, ``bool [batch, columns]``; a mask of somebody else's making is none."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise UnsupportedError(
            f"the attention mask is {mask.dtype} of the shape {tuple(mask.shape)}; kvbits takes a padding mask of "
            "(rows, columns)"
        )
    return mask[:, 0, 0]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[batch, heads, tokens, dim]`` to ``[batch * tokens, heads, dim]``: a plain tensor without gradients."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.detach().as_subclass(Tensor).transpose(1, 2).flatten(0, 1).to(dtype)
