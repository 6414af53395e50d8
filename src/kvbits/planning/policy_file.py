"""The dtypes of a calibrated policy, without its rounding: all that a plan needs of it."""

from __future__ import annotations

import json
from pathlib import Path

from kvbits.codecs import Policy, parse_policy
from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError


def read_dtypes(directory: Path, geometry: ModelGeometry) -> Policy:
    """The policy in ``directory`` (or its ``policy.json``), named after the directory.

    Whether it was calibrated for this very model cannot be told without the weights; the number of layers must agree.
    Raises ``ConfigError`` for what cannot be read or does not fit.
    """
    path = directory / "policy.json" if directory.is_dir() else directory
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        layers, sink = document["layers"], document["sink"]
    except OSError as error:
        raise ConfigError(f"cannot read the policy file '{path}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is no policy: {type(error).__name__}: {error}") from error
    for what, names in (("layers", layers), ("sink", sink)):
        if names is None and what == "sink":
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"'{path}' is no policy: '{what}' is no list of dtypes")
        if len(names) != geometry.num_layers:
            raise ConfigError(f"'{path}' has {len(names)} {what}; {geometry.name} has {geometry.num_layers} layers")
    schemes = tuple(parse_policy(name, 1).layers[0] for name in layers)
    sinks = None if sink is None else tuple(parse_policy(name, 1).layers[0] for name in sink)
    return Policy(path.resolve().parent.name, schemes, sinks)
