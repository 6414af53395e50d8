"""What a model's own files say of it before anything is loaded: neither torch nor transformers is imported.

Only for refusing early what cannot work; a model that is loaded is measured (:func:`kvbits.models.geometry_of`). What
the files do not say is ``None``, and then nothing is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError
from kvbits.models.locate import Source, locate
from kvbits.models.safetensors.carried import carried_by
from kvbits.models.safetensors.file import read_headers
from kvbits.planning.hf_config import has_states, layers_of, surely_recurrent, text_config


@dataclass(frozen=True)
class Outline:
    """``geometry`` where the heads' sizes are known too; ``max_position`` is the context in tokens.

    ``has_template``: whether the tokenizer has a chat template. ``recurrent``: some layers surely are.
    """

    name: str
    num_layers: int | None = None
    max_position: int | None = None
    geometry: ModelGeometry | None = None
    has_template: bool | None = None
    recurrent: bool = False


def outline_of(name: str) -> Outline:
    """The outline of the model ``name`` (as :func:`kvbits.models.load_model` takes it).

    Raises ``ConfigError`` when there is no such model or one of its files is cut off or no model's,
    ``UnsupportedError`` for a GGUF file that kvbits cannot follow.
    """
    source = locate(name)
    if source.gguf is not None:
        return _of_gguf(name, Path(source.path) / source.gguf)
    file = _configuration_file(source)
    if file is None:
        return Outline(name)
    if Path(source.path).is_dir():
        read_headers(file.parent)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        fields = text_config(config)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(f"cannot read the configuration of the model '{name}' ('{file}'): {error}") from error
    carried_by(name, config)
    return _of_fields(name, fields, _says_heads(fields), _has_template(file.parent) if source.offline else None)


def _of_gguf(name: str, path: Path) -> Outline:
    from kvbits.models.gguf.fields import family_of, fields_of
    from kvbits.models.gguf.file import GgufFile

    file = GgufFile(path)
    has_template = "tokenizer.chat_template" in file.metadata
    if family_of(file) is not None:
        return _of_fields(name, fields_of(file), True, has_template)
    return Outline(name, _count(file.own("block_count")), _count(file.own("context_length")), None, has_template)


def _of_fields(name: str, fields: Mapping[str, Any], sure: bool, has_template: bool | None) -> Outline:
    layers, context = _count(fields.get("num_hidden_layers")), _count(fields.get("max_position_embeddings"))
    geometry = None
    if has_states(fields):
        return Outline(name, None, context, None, has_template, surely_recurrent(fields))
    if sure and context is not None and "kv_lora_rank" not in fields:  # latents, or every head's keys
        vocabulary = _count(fields.get("vocab_size")) or 0
        try:
            geometry = ModelGeometry(name, layers_of(fields), context, vocabulary)
        except ConfigError:
            geometry = None
    return Outline(name, layers, context, geometry, has_template)


def _says_heads(fields: Mapping[str, Any]) -> bool:
    """Whether the sizes of heads are written out and not left to the defaults of the family's class."""
    return "head_dim" in fields or {"hidden_size", "num_attention_heads", "num_key_value_heads"} <= fields.keys()


def _has_template(directory: Path) -> bool | None:
    """transformers takes a file of its own, or a field of the tokenizer's configuration."""
    if any(directory.glob("*chat_template*")):
        return True
    try:
        tokenizer = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        # A class of the model's own may bring its template along.
        return "chat_template" in tokenizer or (None if "auto_map" in tokenizer else False)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError):
        return None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _configuration_file(source: Source) -> Path | None:
    """``config.json`` of a directory or, where it is there already, of the hub's cache."""
    path = Path(source.path)
    if path.is_dir():
        return path / "config.json"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.path, "config.json")
    return Path(found) if isinstance(found, str) else None
