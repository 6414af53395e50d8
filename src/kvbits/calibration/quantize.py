"""A checkpoint whose linear layers are rounded with error feedback, made in the memory of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kvbits
from kvbits.calibration.boundary import Call, embedding_in, front
from kvbits.calibration.dense import DenseBackend, dense_step
from kvbits.calibration.output import UNFINISHED, check_output
from kvbits.calibration.parts import Part, Parts
from kvbits.calibration.texts import spread_windows
from kvbits.calibration.weight_layer import round_layer, rounded_linears
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.evaluation.laboratory import Bar
from kvbits.evaluation.resume import key_of
from kvbits.evaluation.selftext import write_windows
from kvbits.memory import check_disk
from kvbits.models import LoadedModel
from kvbits.models.opened import OpenedModel
from kvbits.models.safetensors.pack import quantization_config, write_shards
from kvbits.models.stored import StoredParameter, settled

BITS = {"int4": 4, "int8": 8}
"""Bits of a code by the name that users write."""

_BOUNDARY, _REST = "boundary", "rest"


@dataclass(frozen=True)
class Quantized:
    """``bytes`` of the model; ``error`` is the mean squared error of the products, on the text, as a share of that of
    rounding to nearest; ``layers`` is how many linear layers were rounded."""

    bytes: int
    error: float
    layers: int


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a part, read when they are asked for."""

    def __init__(self, part: Part) -> None:
        self._part, self._names = part, part.names()

    def __getitem__(self, name: str) -> Tensor:
        return self._part.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@torch.no_grad()
def quantize(
    opened: OpenedModel,
    texts: Sequence[tuple[str, Sequence[int]]],
    output: Path,
    weights: str,
    sizes: tuple[int, int],
    bar: Bar,
    note: Callable[[str], None],
    author: Callable[[], LoadedModel],
) -> Quantized:
    """Round the linear layers of ``opened`` to ``weights`` (:data:`BITS`) and write a compressed-tensors checkpoint.

    ``sizes`` are the tokens of a window and how many windows of ``texts`` (names and token ids) are read; without
    texts ``author`` gives the model that writes one. Embedding, head, norms and biases stay in 16 bits. Finished layers
    are kept in the directory :data:`UNFINISHED` of ``output``; the same call goes on from there.

    Raises ``ConfigError`` for texts that are too short, what cannot be written, and
    parts of another run; ``UnsupportedError`` for a model that cannot go layer by layer or has nothing to round.
    """
    check_output(output)
    run = _Run(opened, BITS[weights], sizes)
    windows = spread_windows([tokens for _, tokens in texts], *sizes) if texts else None
    parts = Parts(output / UNFINISHED, _run_of(opened, texts, weights, sizes))
    if len(parts):
        note(f"going on with {len(parts)} finished parts in '{parts.directory}'")
    check_disk("the rounded model", run.room, output)
    shares = run.layers(windows or _own_text(author, sizes, bar, parts), parts, bar)
    return _write(run, parts, output, shares)


class _Run:
    def __init__(self, opened: OpenedModel, bits: int, sizes: tuple[int, int]) -> None:
        self.opened, self.bits, self._sizes = opened, bits, sizes
        names = {id(module): name for name, module in opened.loaded.model.named_modules()}
        self._prefixes = [names[id(layer)] for layer in opened.layers]
        self.rounded = [
            f"{prefix}.{name}"
            for prefix, layer in zip(self._prefixes, opened.layers, strict=True)
            for name in rounded_linears(layer)
        ]
        if not self.rounded:
            raise UnsupportedError(f"the model '{opened.loaded.name}' has no linear layer that can be rounded")

    @property
    def room(self) -> int:
        """Bytes on the disk: finished parts, the model made of them, and one boundary that replaces another."""
        model = self.opened.loaded.model
        whole = sum(parameter.numel() for parameter in model.parameters())
        inside = sum(model.get_parameter(f"{name}.weight").numel() for name in self.rounded)
        rest = 2 * (whole - inside) + inside * (self.bits + 1) // 8
        hidden = self._sizes[0] * self._sizes[1] * model.get_input_embeddings().weight.shape[1]
        return int(2 * rest + 2 * 4 * hidden)

    def layers(self, windows: Sequence[Sequence[int]], parts: Parts, bar: Bar) -> list[float]:
        """Round all layers that are not in ``parts`` yet; returns what :func:`round_layer` says of their errors."""
        opened, count, tokens = self.opened, len(self.opened.layers), sum(map(len, windows))
        if parts.get(_REST) is None:
            parts.put(_REST, self._rest())
        hidden, calls = self._front(windows)
        found = parts.get(_BOUNDARY)
        done = 0 if found is None else int(found.facts)
        if found is not None:
            hidden = [found.tensor(str(index)) for index in range(len(hidden))]
        with bar(2 * tokens * count, "rounding") as advance:
            advance(2 * tokens * done)
            for index in range(done, count):
                own = [window[index] for window in calls]
                prefix, layer = self._prefixes[index], opened.layers[index]
                tensors, shares = round_layer(layer, prefix, hidden, own, self.bits, opened.dtype, advance)
                parts.put(f"layer-{index}", tensors, shares)
                parts.put(_BOUNDARY, {str(i): x for i, x in enumerate(hidden)}, index + 1)
        return [share for index in range(count) for share in _whole(parts, f"layer-{index}").facts]

    def _front(self, windows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[list[Call]]]:
        loaded = self.opened.loaded
        step = dense_step(loaded, DenseBackend(keeps=False), len(windows[0]))
        with embedding_in(loaded, self.opened.dtype):
            both = [front(loaded, self.opened.layers, window, step) for window in windows]
        return [hidden for hidden, _ in both], [calls for _, calls in both]

    def _rest(self) -> dict[str, Tensor]:
        """All parameters that are in no layer, shared ones once, and all buffers that belong to a checkpoint."""
        model = self.opened.loaded.model
        inside = {id(parameter) for layer in self.opened.layers for parameter in layer.parameters()}
        outside = {name: part for name, part in model.named_parameters() if id(part) not in inside}
        state = model.state_dict().keys()
        buffers = {name: part.clone() for name, part in model.named_buffers() if name in state}
        return {name: self._plain(part) for name, part in outside.items()} | buffers

    def _plain(self, parameter: nn.Parameter) -> Tensor:
        dtype = self.opened.dtype
        return settled(parameter, dtype) if isinstance(parameter, StoredParameter) else parameter.detach().to(dtype)


def _own_text(author: Callable[[], LoadedModel], sizes: tuple[int, int], bar: Bar, parts: Parts) -> list[list[int]]:
    """Windows that the model writes, perhaps some time ago."""
    part = parts.get("text")
    begun: list[list[int]] = [] if part is None else part.facts
    if begun and all(len(text) == sizes[0] for text in begun):
        return begun
    with bar(sizes[0] * sizes[1], "writing a text") as advance:
        return write_windows(
            author(), *sizes, progress=advance, begun=begun, keep=lambda text: parts.put("text", {}, text)
        )


def _write(run: _Run, parts: Parts, output: Path, shares: Sequence[float]) -> Quantized:
    names = [_REST, *(f"layer-{index}" for index in range(len(run.opened.layers)))]
    found = [_Lazy(_whole(parts, name)) for name in names]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in found]
    write_shards(output, zip(sizes, found, strict=True))
    model = run.opened.loaded.model
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ignored = sorted(set(linears) - set(run.rounded))
    run.opened.describe(output, quantization_config(run.bits, ignored))
    parts.remove()
    return Quantized(sum(sizes), sum(shares) / len(shares), len(run.rounded))


def _whole(parts: Parts, name: str) -> Part:
    found = parts.get(name)
    if found is None:
        raise ConfigError(f"the finished part '{name}' in '{parts.directory}' is damaged; delete the directory")
    return found


def _run_of(
    opened: OpenedModel, texts: Sequence[tuple[str, Sequence[int]]], weights: str, sizes: tuple[int, int]
) -> dict[str, Any]:
    return {
        "model": f"{opened.loaded.name} ({opened.loaded.fingerprint})",
        "texts": {name: key_of(list(tokens)) for name, tokens in texts},
        "window": sizes[0],
        "windows": sizes[1],
        "weights": weights,
        "kvbits": kvbits.__version__,
    }
