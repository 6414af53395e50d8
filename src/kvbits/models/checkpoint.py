"""A model as a Hugging Face directory that other engines read, and the names of its attention modules."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import CONFIG_NAME

from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.files import write_text
from kvbits.models.load import LoadedModel
from kvbits.models.locate import locate
from kvbits.models.quiet import quiet
from kvbits.models.reader import Reader

_SKIPPED = (".gguf", ".bin", ".pth", ".pt")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def write_checkpoint(name: str, directory: Path, trust_remote_code: bool = False) -> None:
    """Put the model ``name`` into ``directory``: weights in bfloat16 or as they are, configuration, tokenizer.

    A directory of safetensors is copied; anything else is loaded and written. Raises ``ConfigError`` when the model
    cannot be read or ``directory`` is its own or cannot be written.
    """
    source = locate(name)
    before: set[Path] = set()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        before = set(directory.iterdir())
        if source.gguf is None and Path(source.path).is_dir():
            _copy(Path(source.path), directory)
        else:
            _convert(Reader(name, source, trust_remote_code), directory)
        _open_to_others(directory)
    except (OSError, SafetensorError) as error:
        for file in set(directory.iterdir()) - before if directory.is_dir() else ():
            if file.is_file():
                file.unlink()  # a file that is cut off is none
        raise ConfigError(f"cannot write the model '{name}' to '{directory}': {error}") from error


def describe(
    reader: Reader, loaded: LoadedModel, directory: Path, dtype: torch.dtype, quantization: Mapping[str, Any]
) -> None:
    """Put all of a model that is no weights into ``directory``, the configuration last and saying ``quantization``.

    ``dtype`` is that of weights of 16 bits. Raises ``ConfigError`` where ``directory`` cannot be written.
    """
    source, config = reader.directory(), directory / CONFIG_NAME
    try:
        if source is None:
            with quiet():
                loaded.tokenizer.save_pretrained(directory)
                if loaded.model.generation_config is not None:
                    loaded.model.generation_config.save_pretrained(directory)
            fields = json.loads(loaded.model.config.to_json_string())
            fields["architectures"] = [type(loaded.model).__name__]
        else:
            for file in sorted(source.iterdir()):
                if file.is_file() and file.name != CONFIG_NAME and not file.name.endswith((*_SKIPPED, *_WEIGHTS)):
                    shutil.copy2(file, directory / file.name)
            fields = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
        fields.pop("compression_config", None)
        fields.pop("torch_dtype", None)
        fields |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": dict(quantization)}
        write_text(config, json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the model to '{directory}': {error}") from error


def attention_modules(model: nn.Module, geometry: ModelGeometry) -> list[str]:
    """The name of every layer's attention module, in the order of the layers; ``model`` needs no weights.

    Raises ``UnsupportedError`` for a model whose attention has no separate key and value projections: engines look for
    a layer's scales beside those.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        index: Any = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            found[index] = name
    count = geometry.num_layers
    places = list(geometry.places or range(count))
    if sorted(found) != places:
        raise UnsupportedError(
            f"{len(found)} of the {count} layers of {geometry.name} have projections k_proj and v_proj"
        )
    return [found[i] for i in places]


def _open_to_others(directory: Path) -> None:
    """Weights are as readable as the configuration beside them: their library makes files for their owner alone."""
    mode = stat.S_IMODE((directory / "config.json").stat().st_mode)
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def _copy(source: Path, directory: Path) -> None:
    if source.resolve() == directory.resolve():
        raise ConfigError(f"'{directory}' is the model's own directory; give another one for the export")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _SKIPPED:
            shutil.copy2(file, directory / file.name)


def _convert(reader: Reader, directory: Path) -> None:
    model, tokenizer = reader.weights(torch.bfloat16)(), reader.tokenizer()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
