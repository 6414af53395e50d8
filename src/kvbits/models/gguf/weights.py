"""A model built without memory, whose tensors are then taken from the map of a GGUF file into their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.quants import dequantize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.buffers import fill_buffers
from kvbits.models.gguf.families import Family
from kvbits.models.gguf.fields import known_family
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.header import TensorInfo
from kvbits.models.gguf.native import native_sources, place
from kvbits.models.gguf.rope import TENSORS as _ROPE_TENSORS
from kvbits.models.gguf.source import Source
from kvbits.models.packed import PackedEmbedding
from kvbits.models.quiet import quiet

_BLOCK = 1 << 17
"""Elements that are unpacked at a time, so that what numpy makes on the way stays in the processor's cache."""

_PIECE = (1 << 15) - 1
"""Elements that torch converts at a time: more would start its own threads in each of ours."""

_TASK = 1 << 21

_GATE_UP = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj")
_DOWN = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.down_proj")

_UNMAPPED = {"lm_head": "output"}
"""Names that the ``gguf`` package's table has not for families that usually share the embedding."""


class Weights:
    """The causal language model of ``config`` without memory, and where each of its weights lies in ``file``.

    Names, shapes and types are checked here, before a tensor is read. Raises ``ConfigError`` naming a tensor that is
    missing or of another shape, ``UnsupportedError`` naming one that the model has no place for or whose type cannot be
    unpacked.
    """

    def __init__(
        self,
        file: GgufFile,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attention: str | None = None,
        native: bool = False,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
        with quiet(), torch.device("meta"), no_init_weights():
            self._model: Any = AutoModelForCausalLM.from_config(config, **options)
        self._dtype, self._native = dtype, native
        self._sources = list(plan(file, self._model, known_family(file)))
        _check_types(self._sources)

    def read(self) -> Any:
        """Take the weights from the file into the model and return it; once.

        With ``native``, what the kernels can multiply as it is stays in its bits.
        """
        model = self._model
        fill_buffers(model)  # while the parameters have no memory: a new model's buffers and weights are set together
        packed = native_sources(self._sources, model) if self._native else []
        layers = {source.name.rpartition(".")[0] for source in packed}
        biases = [source for source in self._sources if _bias_of(source) in layers]
        left = [source for source in self._sources if source not in packed and source not in biases]
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        filled = {source.name: torch.empty(shapes[source.name], dtype=self._dtype) for source in left}
        fill(left, filled)
        for name, tensor in filled.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
        place(packed, {_bias_of(source): _whole(source) for source in biases}, model)
        if not isinstance(model.get_input_embeddings(), PackedEmbedding):  # whose head is set already
            model.tie_weights()
        return model.eval()


def _bias_of(source: Source) -> str:
    """The layer whose bias it is; empty for anything else."""
    owner, _, leaf = source.name.rpartition(".")
    return owner if leaf == "bias" else ""


def _whole(source: Source) -> Tensor:
    return torch.from_numpy(_values(source.tensor.rows(), source)).flatten()


def plan(file: GgufFile, model: Any, family: Family) -> Iterator[Source]:
    """The source of every parameter of ``model``, shared ones once."""
    layers = model.config.num_hidden_layers
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(arch, layers)
    left = set(file.tensors) - _ROPE_TENSORS
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        if (layer := _GATE_UP.fullmatch(name)) is not None:
            yield from _gate_up(file, name, tuple(parameter.shape), layer[1], left)
            continue
        if (layer := _DOWN.fullmatch(name)) is not None:
            stem, suffix = f"blk.{layer[1]}.ffn_down_exps", "weight"
        stored = f"{names.get_name(stem) or _UNMAPPED.get(stem, stem)}.{suffix}"
        tensor = _of_shape(file, stored, name, tuple(parameter.shape))
        left.discard(stored)
        norm = family.one_more and stored.endswith("norm.weight")
        yield Source(name, tensor, _order(tensor, model, family), -1.0 if norm else 0.0)
    if left:
        raise UnsupportedError(
            f"the GGUF file '{file.path}' has tensors that the {family.model_type} model has no place for: "
            f"{', '.join(sorted(left)[:3])}"
        )


def _of_shape(file: GgufFile, stored: str, name: str, shape: tuple[int, ...]) -> TensorInfo:
    tensor = file.tensors.get(stored)
    if tensor is None:
        raise ConfigError(f"the GGUF file '{file.path}' has no tensor {stored} (the model's {name})")
    if shape not in (tensor.shape, (1, *tensor.shape)):
        raise ConfigError(
            f"tensor {stored} of the GGUF file '{file.path}' has the shape {list(tensor.shape)}; the model's {name} "
            f"has {list(shape)}"
        )
    return tensor


def _gate_up(file: GgufFile, name: str, shape: tuple[int, ...], layer: str, left: set[str]) -> Iterator[Source]:
    """Gate and up of all experts, which transformers keeps as one parameter ``[experts, 2 x rows, columns]``."""
    rows = shape[1] // 2
    for i, part in enumerate(("gate", "up")):
        stored = f"blk.{layer}.ffn_{part}_exps.weight"
        tensor = _of_shape(file, stored, name, (shape[0], rows, shape[2]))
        left.discard(stored)
        yield Source(name, tensor, group=rows, shift=i * rows)


def _order(tensor: TensorInfo, model: Any, family: Family) -> np.ndarray | None:
    """The stored row of each row of Q and K: llama.cpp's converter interleaves the two halves of every head."""
    part = tensor.name.split(".")[-2]
    if not family.permuted or part not in ("attn_q", "attn_k") or not tensor.name.endswith(".weight"):
        return None
    config = model.config
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def fill(sources: Iterable[Source], targets: dict[str, Tensor]) -> None:
    """Unpack every source into its target, in as many threads as torch computes with."""
    tasks = []
    for source in sources:
        rows = source.tensor.rows()
        step = max(1, _TASK // max(1, source.tensor.shape[-1]))
        tasks += [(source, targets[source.name], first, step) for first in range(0, len(rows), step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(_unpack, *task) for task in tasks]:
            done.result()


def _unpack(source: Source, target: Tensor, first: int, count: int) -> None:
    rows, columns = source.tensor.rows(), source.tensor.shape[-1]
    flat = target.view(-1)
    step = max(1, _BLOCK // columns)
    last = min(first + count, len(rows))
    begin = first
    while begin < last:
        end = min(begin + step, last, begin + source.run(begin))
        part = rows[begin:end] if source.order is None else rows[source.order[begin:end]]
        values = torch.from_numpy(_values(part, source)).view(-1)
        to = source.place(begin) * columns
        for at in range(0, len(values), _PIECE):
            piece = values[at : at + _PIECE]
            flat[to + at : to + at + len(piece)].copy_(piece)
        begin = end
    if source.order is None:
        source.tensor.release(first, last)


def _values(part: np.ndarray, source: Source) -> np.ndarray:
    values: np.ndarray = dequantize(part, source.tensor.kind)
    if source.add:
        return values + np.float32(source.add)
    return values if values.flags.writeable else values.copy()


def _check_types(sources: Iterable[Source]) -> None:
    for kind, source in {source.tensor.kind: source for source in sources}.items():
        try:
            dequantize(source.tensor.rows()[:1], kind)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"tensor {source.tensor.name} of the GGUF file '{source.tensor.file.path}' is of type {kind.name}, "
                "which kvbits cannot unpack"
            ) from error
