"""The JSON part of a calibrated policy on disk, ``policy.json``. No torch.

``docs/formats.md`` describes every field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbits.codecs.names import Pair, PolicyNames, parse_names
from kvbits.errors import ConfigError

FORMAT, VERSION = "kvbits-policy", 2
JSON_FILE, TENSOR_FILE = "policy.json", "rounding.safetensors"


def read_document(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises ``ConfigError`` where it cannot be read or is none."""
    try:
        document = json.loads(read_file(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is damaged: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"'{path}' is damaged: it holds no JSON object")
    return document


def read_file(path: Path) -> bytes:
    """The bytes of a policy's file. Raises ``ConfigError`` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the policy file '{path}': {error.strerror or error}") from error


def check_version(path: Path, document: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for a document of another kind or version."""
    found = {"format": document.get("format"), "version": document.get("version")}
    if found != {"format": FORMAT, "version": VERSION}:
        raise ConfigError(f"'{path}' is {found}; this version reads {FORMAT} version {VERSION}")


def names_of(path: Path, document: Mapping[str, Any], model: str, num_layers: int | None) -> PolicyNames:
    """The dtypes of the layers and of every first page, for ``model``; ``None``: any number of layers is right.

    The first page has one for each layer in the file, which are the same. Raises ``ConfigError`` for what is damaged
    or does not fit.
    """
    for what in ("layers", "sink"):
        if what not in document:
            raise ConfigError(f"'{path}' is damaged: it has no '{what}'")
    layers = _pairs(path, "layers", document["layers"], model, num_layers)
    sink = None if document["sink"] is None else _pairs(path, "sink", document["sink"], model, num_layers)
    return PolicyNames(path.resolve().parent.name, layers, sink)


def read_names(directory: Path, model: str, num_layers: int | None) -> PolicyNames:
    """The names of the policy in ``directory``, checked as far as can be without the model's weights.

    Raises ``ConfigError`` for what is missing, damaged, of another version, or for another number of layers.
    """
    path = directory / JSON_FILE
    document = read_document(path)
    check_version(path, document)
    if not (directory / TENSOR_FILE).is_file():
        read_file(directory / TENSOR_FILE)
    return names_of(path, document, model, num_layers)


def _pairs(path: Path, what: str, names: Any, model: str, num_layers: int | None) -> tuple[Pair, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"'{path}' is damaged: '{what}' is no list of dtypes")
    if num_layers is not None and len(names) != num_layers:
        raise ConfigError(f"'{path}' has {len(names)} {what}; {model} has {num_layers} layers")
    return tuple(parse_names(name, 1).layers[0] for name in names)
