"""What names a model: a hash of its configuration and of a few of its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvbits.errors import UnsupportedError
from kvbits.models.locate import locate
from kvbits.models.packed import packed_parameters
from kvbits.models.quiet import quiet
from kvbits.models.reader import Reader
from kvbits.models.safetensors.file import read_headers
from kvbits.models.safetensors.maps import Maps
from kvbits.models.stored import StoredParameter

_VOLATILE = frozenset(
    {"_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config"}
)
_SAMPLE = 16


def fingerprint(model: Any, values_of: Callable[[str], Tensor] | None = None) -> str:
    """Hash the configuration, and name, shape and a few spread values (as bfloat16) of every parameter.

    16 hex digits, whatever the dtype that the model is loaded in. ``values_of`` finds the values of a parameter of a
    ``model`` that has none (on torch's device ``meta``).
    """
    facts = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    samples = [(name, tuple(p.shape), _values(name, p, values_of)) for name, p in model.named_parameters()]
    samples += [(name, shape, _sample_rows(shape, rows)) for name, shape, rows in packed_parameters(model)]
    for name, shape, sample in sorted(samples, key=lambda entry: entry[0]):
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def of_heads(fingerprint: str) -> str:
    """The :func:`fingerprint` of the same model where it has latents and caches every head's keys and values: pages,
    losses and policies of one are nothing to the other."""
    return hashlib.sha256(f"{fingerprint} expanded".encode()).hexdigest()[:16]


def _values(name: str, parameter: nn.Parameter, values_of: Callable[[str], Tensor] | None) -> Tensor:
    if isinstance(parameter, StoredParameter) and parameter.is_meta:
        return _sample_rows(tuple(parameter.shape), parameter.rows)
    return _sample((parameter.detach() if values_of is None else values_of(name)).flatten())


def _sample(flat: Tensor) -> Tensor:
    return flat[:: _spread(len(flat))][:_SAMPLE]


def _sample_rows(shape: tuple[int, ...], unpack: Callable[[Tensor], Tensor]) -> Tensor:
    count, width = math.prod(shape), shape[-1]
    places = torch.arange(0, count, _spread(count))[:_SAMPLE]
    return unpack(places // width).gather(1, (places % width).unsqueeze(1)).squeeze(1)


def _spread(count: int) -> int:
    return max(1, count // _SAMPLE)


def fingerprint_of(name: str, trust_remote_code: bool = False) -> str:
    """The :func:`fingerprint` of a directory of safetensors or a Hugging Face id in the hub's cache.

    Reads the headers of its files and the values that are hashed, no more, so that another engine can ask for it that
    has loaded the weights in its own way. Raises ``ConfigError`` for files that are missing or damaged,
    ``UnsupportedError`` where they do not hold the parameters under transformers' names.
    """
    source = locate(name)
    if source.gguf is not None:
        raise UnsupportedError(f"the weights of '{name}' lie in a GGUF file; only safetensors can be told apart unread")
    path = Path(source.path)
    directory = path if path.is_dir() else Path(snapshot_download(source.path, local_files_only=True))
    stored = read_headers(directory)
    config = Reader(name, source, trust_remote_code).configuration()
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    for key, parameter in model.named_parameters():
        found = stored[key].shape if key in stored else None
        if found != tuple(parameter.shape):
            raise UnsupportedError(
                f"the files of '{name}' hold the parameter '{key}' as {found}; the model has {tuple(parameter.shape)}, "
                "so a calibrated policy cannot be told to be its own"
            )
    maps = Maps()
    return fingerprint(model, lambda key: maps.tensor(stored[key]))
