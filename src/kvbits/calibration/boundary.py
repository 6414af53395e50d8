"""What goes into the decoder layers of a model, and from one into the next: the model runs layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.calibration.dense import model_inputs
from kvbits.calibration.layerwise import hidden_of
from kvbits.errors import UnsupportedError
from kvbits.models import LoadedModel
from kvbits.models.packed import settle


@dataclass(frozen=True)
class Call:
    """What a layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden_of(layer(hidden, *self.args, **self.kwargs))


class _Reached(Exception):
    """The last layer was called: what follows is not wanted."""


@torch.no_grad()
def front(
    loaded: LoadedModel, layers: Sequence[nn.Module], window: Sequence[int], step: Forward
) -> tuple[Tensor, list[Call]]:
    """What the first layer gets of ``window`` (token ids), ``float32 [1, tokens, hidden]``, and each layer's call.

    Raises ``UnsupportedError`` for a model whose layers do not hand their output straight to the next.
    """
    for in_tuple in (False, True):
        found = _caught(loaded, layers, window, step, in_tuple)
        if found is not None:
            return found
    raise UnsupportedError(
        f"the layers of {loaded.name} do not hand their output straight to the next; calibration goes layer by layer "
        "and cannot follow"
    )


@contextmanager
def embedding_in(loaded: LoadedModel, dtype: torch.dtype) -> Iterator[None]:
    """The embedding's values are those of ``dtype``, and given as float32; afterwards it is in its file again."""
    embedding: Any = loaded.model.get_input_embeddings()
    stored = embedding.weight
    hook = embedding.register_forward_hook(lambda module, args, output: output.float())
    try:
        settle(embedding, dtype)
        yield
    finally:
        hook.remove()
        embedding.register_parameter("weight", stored)


def _caught(
    loaded: LoadedModel, layers: Sequence[nn.Module], window: Sequence[int], step: Forward, in_tuple: bool
) -> tuple[Tensor, list[Call]] | None:
    first: list[Tensor] = []
    calls: list[Call] = []

    def catch(*args: Any, **kwargs: Any) -> Any:
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        first.append(hidden)
        calls.append(Call(tuple(others), kwargs))
        if hidden is not first[0] or len(calls) == len(layers):
            raise _Reached
        return (hidden,) if in_tuple else hidden

    try:
        for layer in layers:
            layer.forward = catch
        loaded.model(**model_inputs(loaded, window), logits_to_keep=torch.tensor([len(window) - 1]), kvbits=step)
    except _Reached:
        pass
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return (first[0], calls) if len(calls) == len(layers) and first[-1] is first[0] else None
