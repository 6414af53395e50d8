"""Tensors whose bits the kernels multiply as they are: from the map of the file into their packed places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvbits.kernels.experts import Experts
from kvbits.kernels.products import STRIP, PackedWeight, Products
from kvbits.models.experts import PackedExperts, gate_of
from kvbits.models.gguf.source import Source
from kvbits.models.packed import PackedLinear, is_embedding, packed_embedding
from kvbits.weights import FORMATS, WeightFormat

_TASK = 1 << 22
"""Weights that a thread takes at a time."""


def native_sources(sources: Sequence[Source], model: Any) -> list[Source]:
    """The parameters whose bits the kernels read as they are: whole weights of linear layers, embeddings and experts
    (all three of a layer), of a type in :data:`kvbits.weights.FORMATS` with fewer than 16 bits."""
    odd = {_owner(source) for source in sources if _is_experts(source, model) and _format(source) is None}
    return [source for source in sources if _packs(source, model) and _owner(source) not in odd]


def _packs(source: Source, model: Any) -> bool:
    if source.add or _format(source) is None:
        return False
    if _is_experts(source, model):
        return True
    module, leaf = model.get_submodule(_owner(source)), source.name.rpartition(".")[2]
    linear = type(module) is nn.Linear or is_embedding(module)
    return bool(leaf == "weight" and linear and not source.group and len(source.tensor.shape) == 2)


def _is_experts(source: Source, model: Any) -> bool:
    return gate_of(model.get_submodule(_owner(source))) is not None


def _owner(source: Source) -> str:
    return source.name.rpartition(".")[0]


def _format(source: Source) -> WeightFormat | None:
    found = FORMATS.get(source.tensor.kind.name.lower())
    return found if found is not None and found.rounds_inputs else None


@dataclass(frozen=True)
class _Piece:
    """A packed weight, and its first row in the tensor."""

    source: Source
    weight: PackedWeight
    row: int = 0


def place(sources: Sequence[Source], biases: dict[str, Tensor], model: Any) -> None:
    """Pack every one of the :func:`native_sources` into the layer that takes its module's place in ``model``.

    ``biases`` ``float32`` by the layers' names. A head that shares the embedding's weight shares the packed one.
    """
    experts: dict[str, list[Source]] = {}
    pieces: dict[str, _Piece] = {}
    for source in sources:
        owner = _owner(source)
        if _is_experts(source, model):
            experts.setdefault(owner, []).append(source)
        else:
            rows, columns = source.tensor.shape
            pieces[owner] = _Piece(source, _empty(source, rows, columns, biases.get(owner)))
    mixtures = {owner: [list(_of_experts(source)) for source in three] for owner, three in experts.items()}
    _fill([*pieces.values(), *(piece for parts in mixtures.values() for part in parts for piece in part)])
    products = Products()
    for owner, parts in mixtures.items():
        gate = gate_of(model.get_submodule(owner))
        assert gate is not None, owner
        gates, ups, downs = ([piece.weight for piece in part] for part in parts)  # the order in which they are planned
        model.set_submodule(owner, PackedExperts(Experts(gates, ups, downs, gate), products))
    _set_layers({owner: piece.weight for owner, piece in pieces.items()}, model, products)


def _empty(source: Source, rows: int, columns: int, bias: Tensor | None = None) -> PackedWeight:
    found = _format(source)
    assert found is not None, source.name
    return PackedWeight.empty(rows, columns, found, bias)


def _of_experts(source: Source) -> Iterator[_Piece]:
    count, rows, columns = source.tensor.shape
    for index in range(count):
        yield _Piece(source, _empty(source, rows, columns), index * rows)


def _set_layers(packed: dict[str, PackedWeight], model: Any, products: Products) -> None:
    embedding = model.get_input_embeddings()
    for owner, weight in packed.items():
        module = model.get_submodule(owner)
        if is_embedding(module):
            model.set_submodule(owner, packed_embedding(module, weight))
            if module is embedding and model.config.tie_word_embeddings:
                model.set_output_embeddings(PackedLinear(weight, products))
        else:
            model.set_submodule(owner, PackedLinear(weight, products))


def _fill(pieces: Iterable[_Piece]) -> None:
    tasks = []
    for piece in pieces:
        strips = piece.weight.strips
        step = max(1, _TASK // (STRIP * piece.weight.in_features))
        tasks += [(piece, first, min(first + step, strips)) for first in range(0, strips, step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(_fill_strips, *task) for task in tasks]:
            done.result()


def _fill_strips(piece: _Piece, first: int, last: int) -> None:
    source, weight, row = piece.source, piece.weight, piece.row
    order = None if source.order is None else source.order.astype(np.int64)
    weight.fill(source.tensor.rows()[row : row + weight.out_features], order, first, last)
    if order is None:
        source.tensor.release(row + first * STRIP, row + min(last * STRIP, weight.out_features))
    elif last == weight.strips:
        source.tensor.release(0, weight.out_features)
