"""A calibrated policy on disk: ``policy.json`` and ``rounding.safetensors`` in one directory.

``docs/formats.md`` describes every field. The JSON carries the SHA-256 of the tensor file, so that a policy that
was damaged or mixed with another is refused, and the model's fingerprint, so that one of another model is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kvbits.codecs.base import LayerRounding, Rounding, Scheme
from kvbits.codecs.policy import Policy, parse_policy
from kvbits.config import POLICY_PREFIX, ModelGeometry
from kvbits.errors import ConfigError

FORMAT, VERSION = "kvbits-policy", 2
_JSON, _TENSORS = "policy.json", "rounding.safetensors"


def policy_of(dtype: str | Policy, geometry: ModelGeometry, fingerprint: str | None) -> Policy:
    """The policy that a KV cache dtype names: ``policy:DIR`` is a calibrated one, anything else for
    :func:`~kvbits.codecs.parse_policy`; a policy stays what it is.

    Its ``label`` is what was written. Without a ``fingerprint`` (nothing but sizes is wanted) a calibrated policy is
    read without its rounding. Raises ``ConfigError`` for what cannot be read or belongs to another model.
    """
    if isinstance(dtype, Policy):
        if len(dtype.layers) != geometry.num_layers:
            own = geometry.num_layers
            raise ConfigError(
                f"the policy '{dtype.label}' is for {len(dtype.layers)} layers; {geometry.name} has {own}"
            )
        return dtype
    if dtype.startswith(POLICY_PREFIX):
        directory = Path(dtype.removeprefix(POLICY_PREFIX))
        found = load_policy(directory, geometry, fingerprint) if fingerprint else read_dtypes(directory, geometry)
    else:
        found = parse_policy(dtype, geometry.num_layers)
    return replace(found, label=dtype)


def save_policy(
    directory: Path, policy: Policy, geometry: ModelGeometry, fingerprint: str, measured: Mapping[str, Any]
) -> Policy:
    """Write ``policy`` (layers, sink, rounding) to ``directory``; returns it as :func:`load_policy` would read it.

    ``measured`` is kept as it is: what the policy was fitted to and what was measured. Raises ``ConfigError`` where it
    cannot be written.
    """
    data = save_tensors(_tensors_of(policy))
    layers = [scheme.name for scheme in policy.layers]
    sink = None if policy.sink is None else [scheme.name for scheme in policy.sink]
    checksum = hashlib.sha256(data).hexdigest()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": geometry.name, "fingerprint": fingerprint},
        "layers": layers,
        "sink": sink,
        "bits_per_element": policy.bits_per_element(geometry),
        "tensors": {"file": _TENSORS, "sha256": checksum},
        "measured": dict(measured),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _TENSORS).write_bytes(data)
        (directory / _JSON).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the policy to '{directory}': {error.strerror or error}") from error
    return replace(policy, name=_identity(layers, sink, checksum), label=f"{POLICY_PREFIX}{directory}")


def load_policy(directory: Path, geometry: ModelGeometry, fingerprint: str) -> Policy:
    """Read the policy in ``directory``, made for the model with ``fingerprint``.

    Raises ``ConfigError`` when a file is missing, damaged or of another version, when a layer is missing, or when the
    policy belongs to another model.
    """
    path = directory / _JSON
    document = _document(path)
    found = {"format": document.get("format"), "version": document.get("version")}
    if found != {"format": FORMAT, "version": VERSION}:
        raise ConfigError(f"'{path}' is {found}; this version reads {FORMAT} version {VERSION}")
    try:
        model, checksum = document["model"], document["tensors"]["sha256"]
        owner = model["name"], model["fingerprint"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged: it has no {error}") from error
    if owner[1] != fingerprint:
        raise ConfigError(
            f"the policy '{directory}' was calibrated for {owner[0]} ({owner[1]}); this model is {geometry.name} "
            f"({fingerprint})"
        )
    layers, sink = _schemes_of(path, document, geometry)
    data = _read(directory / _TENSORS)
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ConfigError(f"'{directory / _TENSORS}' does not belong to '{path}': its SHA-256 is another one")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ConfigError(f"'{directory / _TENSORS}' is no safetensors file: {error}") from error
    rounding = tuple(
        LayerRounding(
            _rounding(tensors, f"{i}.key", g.num_kv_heads, g.key_dim),
            _rounding(tensors, f"{i}.value", g.num_kv_heads, g.value_dim),
        )
        for i, g in enumerate(geometry.layers)
    )
    name = _identity(document["layers"], document["sink"], checksum)
    return Policy(name, layers, sink, rounding)


def read_dtypes(directory: Path, geometry: ModelGeometry) -> Policy:
    """The dtypes of the policy in ``directory`` (or its ``policy.json``) without its rounding, named after the
    directory: all that a plan needs of it.

    Whether it was calibrated for this very model cannot be told without the weights; the number of layers must agree.
    Raises ``ConfigError`` for what cannot be read or does not fit.
    """
    path = directory / _JSON if directory.is_dir() else directory
    layers, sink = _schemes_of(path, _document(path), geometry)
    return Policy(path.resolve().parent.name, layers, sink)


def _identity(layers: list[str], sink: list[str] | None, checksum: str) -> str:
    """A name that follows whatever changes the bytes of a page."""
    return f"calibrated-{hashlib.sha256(json.dumps([layers, sink, checksum]).encode()).hexdigest()[:16]}"


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is damaged: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"'{path}' is damaged: it holds no JSON object")
    return document


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the policy file '{path}': {error.strerror or error}") from error


def _schemes_of(
    path: Path, document: Mapping[str, Any], geometry: ModelGeometry
) -> tuple[tuple[Scheme, ...], tuple[Scheme, ...] | None]:
    """The schemes of the layers and of every first page."""
    for what in ("layers", "sink"):
        if what not in document:
            raise ConfigError(f"'{path}' is damaged: it has no '{what}'")
    sink = None if document["sink"] is None else _schemes(path, "sink", document["sink"], geometry)
    return _schemes(path, "layers", document["layers"], geometry), sink


def _schemes(path: Path, what: str, names: Any, geometry: ModelGeometry) -> tuple[Scheme, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"'{path}' is damaged: '{what}' is no list of dtypes")
    if len(names) != geometry.num_layers:
        raise ConfigError(f"'{path}' has {len(names)} {what}; {geometry.name} has {geometry.num_layers} layers")
    return tuple(parse_policy(name, 1).layers[0] for name in names)


def _tensors_of(policy: Policy) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(policy.rounding or ()):
        for side, rounding in (("key", layer.key), ("value", layer.value)):
            for name, tensor in (("feedback", rounding.feedback), ("clip", rounding.clip), ("order", rounding.order)):
                if tensor is not None:
                    tensors[f"{index}.{side}.{name}"] = tensor.clone(
                        memory_format=torch.contiguous_format
                    )  # the format has no shared memory
    return tensors


def _rounding(tensors: Mapping[str, Tensor], name: str, heads: int, dim: int) -> Rounding:
    found = {}
    for part, shape, dtype in (
        ("feedback", (heads, dim, dim), torch.float32),
        ("clip", (heads,), torch.float32),
        ("order", (heads, dim), torch.int32),
    ):
        tensor = found[part] = tensors.get(f"{name}.{part}")
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                f"the tensor '{name}.{part}' of the policy is {tensor.dtype} {tuple(tensor.shape)}; it must be finite "
                f"{dtype} {shape}"
            )
        if part == "order" and not torch.equal(tensor.sort(-1).values, torch.arange(dim).int().expand(heads, dim)):
            raise ConfigError(f"the tensor '{name}.{part}' of the policy is no order of {dim} channels")
    return Rounding(**found)
