"""A model built without memory, whose tensors are then those of the maps of a directory of safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels.products import PackedWeight, Products
from kvbits.models.buffers import fill_buffers
from kvbits.models.packed import PackedLinear, is_embedding, is_packed_later, packed_embedding
from kvbits.models.quiet import quiet
from kvbits.models.safetensors.carried import Carried
from kvbits.models.safetensors.codes import CODES, LEAVES, Coded, read_coded
from kvbits.models.safetensors.file import Stored
from kvbits.models.safetensors.grouped import Grouped, grouped
from kvbits.models.safetensors.maps import Maps
from kvbits.models.safetensors.names import placed
from kvbits.models.stored import StoredParameter, settled
from kvbits.weights import WeightFormat

_ROWS = 1024
"""Outputs that are taken out of their codes at a time; a multiple of 32."""

_FLOATS = ("BF16", "F16", "F32", "F64")


class Weights:
    """The causal language model of ``config`` without memory, and where each of its weights lies in ``directory``.

    Names, shapes and types are checked here, before a tensor is read. Raises ``ConfigError`` naming a file or a tensor
    that is missing, cut off or of another shape, ``UnsupportedError`` naming one that kvbits cannot read.
    """

    def __init__(
        self,
        directory: Path,
        stored: Mapping[str, Stored],
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attention: str | None = None,
        carried: Carried | None = None,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
        with quiet(), torch.device("meta"), no_init_weights():
            self.model: Any = AutoModelForCausalLM.from_config(config, **options)
        self._directory, self._dtype, self._maps = directory, dtype, Maps()
        self._state: dict[str, Tensor] = self.model.state_dict()
        self._plain: dict[str, Stored] = {}
        self._grouped: dict[str, Grouped] = {}
        self.whole = not self.model._keep_in_fp32_modules_strict
        """Whether every tensor is one parameter; where not, transformers has to read the files."""
        leaves = LEAVES if carried is not None else CODES
        in_bits = {name for name in stored if name.rpartition(".")[2] in leaves}
        names = placed(self.model, [name for name in stored if name not in in_bits])
        layers = placed(self.model, {f"{_stem(name)}.weight" for name in in_bits})
        if names is None or layers is None:
            if carried is not None:
                raise UnsupportedError(
                    f"the experts of the mixture in '{directory}' carry their own quantization, which kvbits does not "
                    "read; take the 16-bit checkpoint, or a GGUF file"
                )
            self.whole = False
        elif self.whole:
            self._place(stored, names, layers, carried)

    def forms(self) -> dict[str, list[WeightFormat]]:
        """Parameters that :meth:`read` leaves in their bits where it may."""
        return {name: [weight.weight_format] for name, weight in self._grouped.items()}

    def read(self, native: bool, packs: bool) -> Any:
        """The model, once. ``packs``: the caller packs layers (:func:`kvbits.models.packed.pack_linears`), whose
        parameters so stay in their maps, in any type. ``native``: weights in bits stay in them."""
        model = self.model
        fill_buffers(model)
        for name, stored in self._plain.items():
            values = self._maps.tensor(stored)
            owner, leaf = self._owner(name), name.rpartition(".")[2]
            if packs and values.is_floating_point() and is_packed_later(owner) and leaf not in owner._buffers:
                owner.register_parameter(leaf, self._in_map(values))
            else:
                self._set(name, values.to(self._state[name].dtype))
        for name, weight in self._grouped.items():
            model.all_tied_weights_keys.pop(name, None)
            if not native:
                self._set_grouped(name, weight, packs)
        model.tie_weights(missing_keys=self._state.keys() - self._plain.keys(), recompute_mapping=False)
        if native:
            self._pack()
        return model.eval()

    def _place(
        self, stored: Mapping[str, Stored], names: Mapping[str, str], layers: Mapping[str, str], carried: Carried | None
    ) -> None:
        for name, target in names.items():
            if target in self._state:
                _expect(stored[name], target, self._state[target])
                self._plain[target] = stored[name]
            else:
                self._check_unknown(stored[name], target)
        for name, target in layers.items():
            if carried is None or target not in self._state or not _takes_bits(self._owner(target)):
                raise UnsupportedError(
                    f"'{self._directory}' has {_stem(name)} in bits, which its config.json or the model does not name"
                )
            self._grouped[target] = grouped(self._coded(stored, _stem(name), target, carried))
        self._check_missing()

    def _coded(self, stored: Mapping[str, Stored], stem: str, target: str, carried: Carried) -> Coded:
        parts = {leaf: self._maps.tensor(stored[key]) for leaf in LEAVES if (key := f"{stem}.{leaf}") in stored}
        rows, columns = self._state[target].shape
        found = read_coded(carried, stem, parts, (rows, columns), str(self._directory))
        if found is None:
            raise ConfigError(f"'{self._directory}' has no codes of {stem}, only {', '.join(sorted(parts))}")
        return found

    def _check_missing(self) -> None:
        """What is tied is needed once."""
        model, found = self.model, self._plain.keys() | self._grouped.keys()
        tied = dict(model.all_tied_weights_keys)
        sources = {source: target for target, source in tied.items()}
        harmless = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        for name in self._state.keys() - found:
            if tied.get(name) in found or sources.get(name) in found or any(rule.search(name) for rule in harmless):
                continue
            raise ConfigError(f"the model directory '{self._directory}' has no tensor {name}")

    def _check_unknown(self, stored: Stored, target: str) -> None:
        """Tensors without a place are left out, as transformers does; but not what changes a layer's result."""
        owner, _, leaf = target.rpartition(".")
        modules = dict(self.model.named_modules())
        if leaf == "bias" and isinstance(modules.get(owner), nn.Linear) and self._maps.tensor(stored).any():
            raise UnsupportedError(
                f"'{stored.path}' has the tensor {stored.name}, for which the {self.model.config.model_type} model "
                "has no place"
            )

    def _owner(self, name: str) -> nn.Module:
        owner: nn.Module = self.model.get_submodule(name.rpartition(".")[0])
        return owner

    def _set(self, name: str, values: Tensor) -> None:
        owner, leaf = self._owner(name), name.rpartition(".")[2]
        if leaf in owner._buffers:
            owner._buffers[leaf] = values
        else:
            owner.register_parameter(leaf, nn.Parameter(values, requires_grad=values.is_floating_point()))

    def _in_map(self, values: Tensor) -> StoredParameter:
        rows = values.flatten(0, -2) if values.ndim > 1 else values
        return StoredParameter(
            values, lambda first, last: rows[first:last], lambda first, last: self._maps.release(rows[first:last])
        )

    def _set_grouped(self, name: str, weight: Grouped, packs: bool) -> None:
        owner, leaf = self._owner(name), name.rpartition(".")[2]
        stored = StoredParameter(owner.get_parameter(leaf).detach(), weight.values, lambda first, last: None)
        if packs and is_packed_later(owner):
            owner.register_parameter(leaf, stored)
        else:
            self._set(name, settled(stored, self._dtype))

    def _pack(self) -> None:
        products = Products()
        for name, weight in self._grouped.items():
            owner = name.rpartition(".")[0]
            layer = self.model.get_submodule(owner)
            packed = PackedWeight.empty(*weight.shape, weight.weight_format, getattr(layer, "bias", None))
            for first in range(0, packed.out_features, _ROWS):
                packed.fill_part(weight.blocks(first, min(first + _ROWS, packed.out_features)).numpy(), first)
            self._maps.release(weight.coded.words)
            self.model.set_submodule(
                owner, packed_embedding(layer, packed) if is_embedding(layer) else PackedLinear(packed, products)
            )


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _takes_bits(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or is_embedding(layer)


def _expect(stored: Stored, target: str, wanted: Tensor) -> None:
    if stored.shape != tuple(wanted.shape):
        raise ConfigError(
            f"tensor {stored.name} of '{stored.path}' has the shape {list(stored.shape)}; the model's {target} has "
            f"{list(wanted.shape)}"
        )
    if wanted.is_floating_point() and stored.dtype not in _FLOATS:
        raise UnsupportedError(
            f"tensor {stored.name} of '{stored.path}' is of type {stored.dtype}; kvbits reads {', '.join(_FLOATS)} and "
            "weights in bits whose config.json names a quantization that it knows"
        )
