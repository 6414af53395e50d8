"""A model built without memory, whose tensors are then taken from the map of a GGUF file into their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
from kvbits.models.gguf.source import Source, Sources
from kvbits.models.packed import PackedEmbedding, is_packed_later
from kvbits.models.quiet import quiet
from kvbits.models.stored import StoredParameter, settled
from kvbits.weights import FORMATS, WeightFormat

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
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
        with quiet(), torch.device("meta"), no_init_weights():
            self.model: Any = AutoModelForCausalLM.from_config(config, **options)
        self._dtype = dtype
        self._sources = list(plan(file, self.model, known_family(file)))
        _check_types(self._sources)

    def forms(self) -> dict[str, list[WeightFormat]]:
        """Parameters that :meth:`read` leaves in their bits where it may, with the formats of their parts."""
        found: dict[str, list[WeightFormat]] = {}
        for source in native_sources(self._sources, self.model):
            found.setdefault(source.name, []).append(FORMATS[source.tensor.kind.name.lower()])
        return found

    def read(self, native: bool = False, packs: bool = False) -> Any:
        """Take the weights from the file into the model and return it; once.

        With ``native``, what the kernels can multiply as it is stays in its bits. ``packs``: the caller packs layers
        (:func:`kvbits.models.packed.pack_linears`), whose parameters so stay in the file.
        """
        model = self.model
        fill_buffers(model)  # while the parameters have no memory: a new model's buffers and weights are set together
        packed = native_sources(self._sources, model) if native else []
        layers = {source.name.rpartition(".")[0] for source in packed}
        biases: dict[str, Tensor] = {}
        for name, parts in _by_name(source for source in self._sources if source not in packed).items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and owner in layers:
                biases[owner] = parts.read(0, 1).flatten()
            else:
                module = model.get_submodule(owner)
                module.register_parameter(leaf, self._parameter(module, leaf, parts, packs))
        place(packed, biases, model)
        if not isinstance(model.get_input_embeddings(), PackedEmbedding):  # whose head is set already
            model.tie_weights()
        return model.eval()

    def _parameter(self, module: nn.Module, leaf: str, parts: Sources, packs: bool) -> nn.Parameter:
        empty = module.get_parameter(leaf).detach()
        stored = StoredParameter(empty, parts.read, parts.release)
        if not packs or not is_packed_later(module):
            return nn.Parameter(settled(stored, self._dtype))
        if leaf.endswith("bias"):
            return StoredParameter(settled(stored, torch.float32), parts.read, parts.release)
        return stored


def _by_name(sources: Iterable[Source]) -> dict[str, Sources]:
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.name, []).append(source)
    return {name: Sources(tuple(parts)) for name, parts in found.items()}


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


def _check_types(sources: Iterable[Source]) -> None:
    for kind, source in {source.tensor.kind: source for source in sources}.items():
        try:
            dequantize(source.tensor.rows()[:1], kind)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"tensor {source.tensor.name} of the GGUF file '{source.tensor.file.path}' is of type {kind.name}, "
                "which kvbits cannot unpack"
            ) from error
