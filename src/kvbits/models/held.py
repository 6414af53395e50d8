"""How many bytes a model's weights will take, from the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvbits.errors import UnsupportedError
from kvbits.kernels.products import PackedWeight, Products
from kvbits.models.experts import experts_parts, gate_of
from kvbits.models.packed import packs
from kvbits.models.quiet import quiet
from kvbits.models.trust import trusted
from kvbits.weights import ROUNDED, WeightFormat

Forms = Mapping[str, Sequence[WeightFormat]]
"""Parameters that stay in bits of their file, by name: the formats of the parts of which they are made."""


def held(model: nn.Module, own: Forms) -> dict[str, int]:
    """:func:`held_bytes` by the name that users write (:data:`kvbits.config.WEIGHT_FORMATS`)."""
    return {"auto": held_bytes(model, "bf16", own)} | {name: held_bytes(model, name, {}) for name in ROUNDED}


def held_bytes(model: nn.Module, weights: str, own: Forms) -> int:
    """Bytes of the parameters of ``model`` as the CPU's kernels in bfloat16 hold them; it needs no memory itself.

    ``own`` stay as they are, what :func:`kvbits.models.packed.pack_linears` packs is in ``weights``
    (:data:`kvbits.weights.ROUNDED`), everything else in 16 bits. Shared parameters count once.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes = {id(parameter): 2 * parameter.numel() for parameter in model.parameters()}
    plain = weights == "bf16" and Products().name == "scalar"
    for layer in model.modules():
        if gate_of(layer) is not None:
            sizes |= _experts(layer, names, weights, own, plain)
            continue
        weight: Any = getattr(layer, "weight", None)
        form = own.get(names.get(id(weight), ""))
        if form is None and not plain and packs(layer, weights):
            form = (ROUNDED[weights],)
        if form is not None:
            sizes[id(weight)] = _size(weight, form[0])
            bias: Any = getattr(layer, "bias", None)
            sizes |= {} if bias is None else {id(bias): 4 * bias.numel()}
    return sum(sizes.values())


def blank(config: PreTrainedConfig) -> Any:
    """A model of this configuration in bfloat16 that takes no memory; ``UnsupportedError`` where there is none."""
    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trusted(config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(
            f"no causal language model can be made of this {config.model_type} model: {reason}"
        ) from error


def _experts(layer: Any, names: Mapping[int, str], weights: str, own: Forms, plain: bool) -> dict[int, int]:
    both, down = (own.get(names[id(p)]) for p in (layer.gate_up_proj, layer.down_proj))
    if both is None or down is None:
        if plain or not packs(layer, weights):
            return {}
        both, down = (ROUNDED[weights],) * 2, (ROUNDED[weights],)
    count, parts = len(layer.down_proj), experts_parts(layer, 0)
    gate, up, last = (_size(w, form) for (w, _), form in zip(parts, (*both, *down), strict=True))
    found = {id(layer.gate_up_proj): count * (gate + up), id(layer.down_proj): count * last}
    biases = [p for name, p in layer.named_parameters(recurse=False) if name.endswith("_bias")]
    return found | {id(bias): 4 * bias.numel() for bias in biases}


def _size(weight: Tensor, weight_format: WeightFormat) -> int:
    rows, columns = weight.shape
    return PackedWeight.size(rows, columns, weight_format)
