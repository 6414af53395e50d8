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

from kvbits.codecs.base import LayerRounding, Rounding
from kvbits.codecs.names import parse_names
from kvbits.codecs.policy import Policy, policy_from
from kvbits.codecs.policy_document import (
    FORMAT,
    JSON_FILE,
    TENSOR_FILE,
    VERSION,
    check_version,
    names_of,
    read_document,
    read_file,
)
from kvbits.config import POLICY_PREFIX, ModelGeometry
from kvbits.errors import ConfigError
from kvbits.files import write_bytes, write_text


def policy_of(dtype: str | Policy, geometry: ModelGeometry, fingerprint: str | None) -> Policy:
    """The policy that a KV cache dtype names: ``policy:DIR`` is a calibrated one, anything else for
    :func:`~kvbits.codecs.parse_policy`, fitted to the model's head sizes; a policy stays what it is.

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
        found = policy_from(parse_names(dtype, geometry.num_layers).fitted(geometry))
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
        "tensors": {"file": TENSOR_FILE, "sha256": checksum},
        "measured": dict(measured),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the policy to '{directory}': {error.strerror or error}") from error
    write_bytes(directory / TENSOR_FILE, data)
    write_text(directory / JSON_FILE, json.dumps(document, indent=1) + "\n")
    return replace(policy, name=_identity(layers, sink, checksum), label=f"{POLICY_PREFIX}{directory}")


def load_policy(directory: Path, geometry: ModelGeometry, fingerprint: str) -> Policy:
    """Read the policy in ``directory``, made for the model with ``fingerprint``.

    Raises ``ConfigError`` when a file is missing, damaged or of another version, when a layer is missing, or when the
    policy belongs to another model.
    """
    path = directory / JSON_FILE
    document = read_document(path)
    check_version(path, document)
    try:
        model, checksum = document["model"], document["tensors"]["sha256"]
        owner = model["name"], model["fingerprint"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged: whose it is, or its tensors' sha256, is missing") from error
    if owner[1] != fingerprint:
        raise ConfigError(
            f"the policy '{directory}' was calibrated for {owner[0]} ({owner[1]}); this model is {geometry.name} "
            f"({fingerprint})"
        )
    found = policy_from(names_of(path, document, geometry.name, geometry.num_layers))
    data = read_file(directory / TENSOR_FILE)
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ConfigError(f"'{directory / TENSOR_FILE}' does not belong to '{path}': its SHA-256 is another one")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ConfigError(f"'{directory / TENSOR_FILE}' is no safetensors file: {error}") from error
    rounding = tuple(
        LayerRounding(
            _rounding(tensors, f"{i}.key", g.num_kv_heads, g.key_dim),
            _rounding(tensors, f"{i}.value", g.num_kv_heads, g.value_dim),
        )
        for i, g in enumerate(geometry.layers)
    )
    name = _identity(document["layers"], document["sink"], checksum)
    return Policy(name, found.layers, found.sink, rounding)


def read_dtypes(directory: Path, geometry: ModelGeometry) -> Policy:
    """The dtypes of the policy in ``directory`` (or its ``policy.json``) without its rounding, named after the
    directory: all that a plan needs of it.

    Whether it was calibrated for this very model cannot be told without the weights; the number of layers must agree.
    Raises ``ConfigError`` for what cannot be read or does not fit.
    """
    path = directory / JSON_FILE if directory.is_dir() else directory
    return policy_from(names_of(path, read_document(path), geometry.name, geometry.num_layers))


def _identity(layers: list[str], sink: list[str] | None, checksum: str) -> str:
    """A name that follows whatever changes the bytes of a page."""
    return f"calibrated-{hashlib.sha256(json.dumps([layers, sink, checksum]).encode()).hexdigest()[:16]}"


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
