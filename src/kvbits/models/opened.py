"""A model whose layers' weights stay in their files until they are asked for, one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvbits.attention import IMPLEMENTATION
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.checkpoint import describe
from kvbits.models.geometry import geometry_of
from kvbits.models.held import blank
from kvbits.models.layers import layers_of
from kvbits.models.load import LoadedModel, register, wrap
from kvbits.models.locate import locate
from kvbits.models.reader import Reader


@dataclass(frozen=True)
class OpenedModel:
    """``loaded`` computes in float32; its linear layers and embeddings hold
    :class:`kvbits.models.stored.StoredParameter`, to be settled, where kvbits reads the files itself.

    ``layers`` are its decoder layers, ``dtype`` is that of its weights of 16 bits.
    """

    loaded: LoadedModel
    layers: tuple[nn.Module, ...]
    dtype: torch.dtype
    reader: Reader

    def describe(self, directory: Path, quantization: dict[str, Any]) -> None:
        """Write all that is no weights (:func:`kvbits.models.checkpoint.describe`)."""
        describe(self.reader, self.loaded, directory, self.dtype, quantization)


def open_model(name: str, allow_requantize: bool = False, trust_remote_code: bool = False) -> OpenedModel:
    """Open ``name`` (as :func:`kvbits.models.load_model` takes it) to round its layers' weights.

    Raises as that, and ``UnsupportedError`` for recurrent layers, chunks and mixtures of experts; ``ConfigError`` for a
    model whose files are quantized, unless ``allow_requantize``.
    """
    reader = Reader(name, locate(name), trust_remote_code)
    geometry = geometry_of(reader.configuration(), name, latents=False)  # every linear layer runs then
    geometry.refuse_states("rounding weights with error feedback")
    geometry.refuse_chunks("rounding weights with error feedback")
    form = reader.quantized()
    if form is not None and not allow_requantize:
        raise ConfigError(
            f"the weights of the model '{name}' are quantized already ({form}), and would be rounded twice; take a "
            "16-bit file, or give --allow-requantize"
        )
    _check_layers(blank(reader.configuration()), geometry.num_layers, name)
    register()
    weights_of = reader.weights(torch.float32, IMPLEMENTATION, packs=True)
    tokenizer = reader.tokenizer()
    loaded = wrap(weights_of(), tokenizer, name, geometry, tried=False)
    stated = str(getattr(reader.configuration(), "dtype", None)).rpartition(".")[2]
    dtype = torch.float16 if stated == "float16" else torch.bfloat16
    return OpenedModel(loaded, tuple(layers_of(loaded.model, geometry.num_layers, name)), dtype, reader)


def _check_layers(model: Any, count: int, name: str) -> None:
    seen: set[int] = set()
    for index, layer in enumerate(layers_of(model, count, name)):
        parameters = dict(layer.named_parameters())
        stacked = next((key for key, value in parameters.items() if value.ndim > 2), None)
        if stacked is not None:
            raise UnsupportedError(
                f"the model '{name}' is a mixture of experts (layer {index} has {stacked}); rounding with error "
                "feedback takes linear layers only: use --weights int8 or int4 when it is loaded"
            )
        if seen & {id(value) for value in parameters.values()}:
            raise UnsupportedError(f"layer {index} of the model '{name}' shares weights with another")
        seen |= {id(value) for value in parameters.values()}
