"""The gradients of one window, layer by layer, in the memory of one layer.

The model runs once without gradients, and only the inputs of the layers and what their attention found are kept
(checkpointing: Chen et al., 2016, arXiv:1604.06174). Then the last layer runs again with gradients, then the one before
it, down to the first. Weights have no gradients, so that this is the work of about three forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbits.attention import Forward
from kvbits.calibration.dense import DenseBackend, Window, dense_step, model_inputs
from kvbits.config import ModelGeometry
from kvbits.errors import UnsupportedError
from kvbits.models import LoadedModel
from kvbits.models.held import blank
from kvbits.models.layers import layers_of

_LOGITS = 1 << 24
"""Logits that are turned into gradients at once, 64 MB of float32, ..."""

_LOGIT_ROWS = 128
"""... of so many rows at most."""

Gradients = tuple[int, Window, Tensor, Tensor]
"""A layer's index, what its attention saw, and the gradients by ``key_error`` and ``value_error``."""


@dataclass(frozen=True)
class _Call:
    """A layer's input, and the other arguments that it was called with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def check_layers(geometry: ModelGeometry, config: Any) -> None:
    """Raise ``UnsupportedError`` for a model of this configuration that has no list of layers, or recurrent ones,
    cached latents, shared keys and values or chunks among them; no weights are needed."""
    _check_shapes(geometry)
    layers_of(blank(config), geometry.num_layers, geometry.name)


def _check_shapes(geometry: ModelGeometry) -> None:
    geometry.refuse_states("calibration")
    geometry.refuse_latents("calibration")
    geometry.refuse_shared("calibration")
    geometry.refuse_chunks("calibration")


class Layers:
    """The decoder layers of a model whose hidden states go from one to the next and nowhere else."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises as :func:`check_layers`."""
        _check_shapes(loaded.geometry)
        self._loaded = loaded
        self._rows = max(1, min(_LOGIT_ROWS, _LOGITS // loaded.geometry.vocab_size))
        self._layers = layers_of(loaded.model, loaded.geometry.num_layers, loaded.name)

    def gradients(
        self, window: Sequence[int], generator: torch.Generator, progress: Callable[[float], None]
    ) -> Iterator[Gradients]:
        """Each layer of ``window`` (token ids), the last first; the window's second half is scored.

        ``generator`` draws the labels; ``progress`` is told the share of the work that is done.
        """
        backend = DenseBackend(keeps=False, known={})
        step = dense_step(self._loaded, backend, len(window))
        count = len(self._layers)
        total = 3 * count + 3  # forward passes of a layer; the head counts as one
        with _frozen(self._loaded.model):
            calls, output = self._forward(window, step, lambda done: progress(done / total))
            slope = self._head(window, output, step, generator)
            backend.keeps = True
            for index in reversed(range(count)):
                call = calls.pop()
                with torch.enable_grad():
                    hidden = call.hidden.detach().requires_grad_()
                    output = hidden_of(self._layers[index](hidden, *call.args, **call.kwargs))
                    seen = backend.windows.pop(index)
                    wanted = hidden, seen.key_error, seen.value_error
                    slope, key, value = torch.autograd.grad(output, wanted, slope)
                progress((total - 2 * index) / total)
                yield index, seen, key, value

    def _forward(
        self, window: Sequence[int], step: Forward, done: Callable[[int], None]
    ) -> tuple[list[_Call], Tensor | tuple[Tensor, ...]]:
        """What each layer was called with, and what the last one gave."""
        calls: list[_Call] = []
        outputs: list[Any] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args or (kwargs["hidden_states"],)
            if outputs and given[0] is not hidden_of(outputs.pop()):
                raise UnsupportedError(
                    f"the layers of {self._loaded.name} do not hand their output straight to the next; calibration "
                    "goes back layer by layer and cannot follow"
                )
            calls.append(_Call(given[0], given[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output)
            done(len(calls))

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        hooks += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            with torch.no_grad():
                self._logits(window, step, torch.arange(len(window) - 1, len(window)))
        finally:
            for hook in hooks:
                hook.remove()
        return calls, outputs.pop()

    def _head(
        self, window: Sequence[int], output: Tensor | tuple[Tensor, ...], step: Forward, generator: torch.Generator
    ) -> Tensor:
        """The gradient by the last layer's output: what follows the layers, a few rows of logits at a time."""
        leaf = hidden_of(output).detach().requires_grad_()
        total = torch.zeros_like(leaf)
        with _answering(self._layers, leaf, isinstance(output, tuple)), torch.enable_grad():
            for rows in torch.arange(len(window) // 2, len(window)).split(self._rows):
                logits = self._logits(window, step, rows)
                total += torch.autograd.grad(logits, leaf, _slope(logits.detach(), generator))[0]
        return total

    def _logits(self, window: Sequence[int], step: Forward, rows: Tensor) -> Tensor:
        inputs = model_inputs(self._loaded, window)
        logits: Tensor = self._loaded.model(**inputs, logits_to_keep=rows.to(self._loaded.device), kvbits=step).logits
        return logits[0]


def hidden_of(output: Any) -> Tensor:
    """Some layers give a tuple that begins with the hidden states."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _answering(layers: Sequence[nn.Module], leaf: Tensor, in_tuple: bool) -> Iterator[None]:
    """``layers`` do nothing but give ``leaf``, in a tuple where they do that."""
    try:
        for layer in layers:
            layer.forward = lambda *_, **__: (leaf,) if in_tuple else leaf
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights: the graph then need not keep what they were multiplied with."""
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _slope(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of ``-log p(y)`` by ``logits`` ``[rows, vocab]``, one ``y`` drawn for each row on the CPU, so that
    every device draws alike."""
    slope = torch.softmax(logits.float(), dim=-1)
    drawn = torch.multinomial(slope.cpu(), 1, generator=generator).to(slope.device)
    slope.scatter_add_(-1, drawn, slope.new_full(drawn.shape, -1.0))
    return slope.to(logits.dtype)
