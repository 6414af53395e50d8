"""Tensors whose bits the kernels multiply as they are: from the map of the file into their packed places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvbits.kernels.products import STRIP, PackedWeight, Products
from kvbits.models.gguf.source import Source
from kvbits.models.packed import PackedLinear, is_embedding, packed_embedding
from kvbits.weights import FORMATS, WeightFormat

_TASK = 1 << 22
"""Weights that a thread takes at a time."""


def native_format(source: Source, model: Any) -> WeightFormat | None:
    """The format in which the kernels read a parameter's bits; ``None`` where it has to be unpacked.

    Whole weights of linear layers and embeddings, of a type in :data:`kvbits.weights.FORMATS` with fewer than 16 bits.
    """
    owner, _, leaf = source.name.rpartition(".")
    module = model.get_submodule(owner)
    found = FORMATS.get(source.tensor.kind.name.lower())
    whole = not source.add and not source.group and len(source.tensor.shape) == 2
    if leaf != "weight" or not whole or not (type(module) is nn.Linear or is_embedding(module)):
        return None
    return found if found is not None and found.rounds_inputs else None


def place(sources: Sequence[Source], biases: dict[str, Tensor], model: Any) -> None:
    """Pack every source of a :func:`native_format` into the layer that takes its module's place in ``model``.

    ``biases`` ``float32`` by the layers' names. A head that shares the embedding's weight shares the packed one.
    """
    products = Products()
    packed: dict[str, PackedWeight] = {}
    for source in sources:
        owner, found = source.name.rpartition(".")[0], native_format(source, model)
        assert found is not None, source.name
        rows, columns = source.tensor.shape
        packed[owner] = PackedWeight.empty(rows, columns, found, biases.get(owner))
    _fill(sources, packed)
    embedding = model.get_input_embeddings()
    for owner, weight in packed.items():
        module = model.get_submodule(owner)
        if is_embedding(module):
            model.set_submodule(owner, packed_embedding(module, weight))
            if module is embedding and model.config.tie_word_embeddings:
                model.set_output_embeddings(PackedLinear(weight, products))
        else:
            model.set_submodule(owner, PackedLinear(weight, products))


def _fill(sources: Iterable[Source], packed: dict[str, PackedWeight]) -> None:
    tasks = []
    for source in sources:
        weight = packed[source.name.rpartition(".")[0]]
        step = max(1, _TASK // (STRIP * weight.in_features))
        tasks += [(source, weight, first, min(first + step, weight.strips)) for first in range(0, weight.strips, step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(_fill_strips, *task) for task in tasks]:
            done.result()


def _fill_strips(source: Source, weight: PackedWeight, first: int, last: int) -> None:
    order = None if source.order is None else source.order.astype(np.int64)
    weight.fill(source.tensor.rows(), order, first, last)
    if order is None:
        source.tensor.release(first * STRIP, min(last * STRIP, weight.out_features))
    elif last == weight.strips:
        source.tensor.release(0, weight.out_features)
