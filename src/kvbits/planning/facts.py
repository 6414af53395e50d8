"""What a plan must know of a model besides its geometry, and the tables of the usual models.

``models.json`` holds the fields of each model's published ``config.json`` that decide sizes, where they were read
(``source``), and the number of parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError
from kvbits.planning.hf_config import MLA, layers_of, text_config

TABLE = "models.json"


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all, those of the token embeddings and the output head, those of routed experts.

    ``active`` is how many one token's step multiplies with.
    """

    total: int
    embeddings: int = 0
    experts: int = 0
    active: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """One model. ``weights`` is the dtype that its publisher ships; ``hidden`` and ``widest`` are sizes in elements.

    ``held``: bytes of the weights by the form that they are loaded in (``--weights``), of a model whose files or
    configuration were read; ``weights`` is then one of these.
    ``source`` says where the facts come from.
    """

    name: str
    source: str
    geometry: ModelGeometry
    parameters: Parameters
    weights: str
    hidden: int
    widest: int
    held: Mapping[str, int] = field(default_factory=dict)


def known_models() -> tuple[str, ...]:
    """The names in the tables, without their aliases."""
    return tuple(entry["name"] for entry in _table())


def known_config(name: str) -> dict[str, Any] | None:
    """The table's configuration fields of ``name`` (or an alias, any case), or ``None``."""
    entry = _find(name)
    return None if entry is None else dict(entry["config"])


def known_facts(name: str, mla: MLA = "latent") -> ModelFacts | None:
    """The facts of ``name`` (or an alias, any case), or ``None`` when the tables do not have it."""
    entry = _find(name)
    if entry is None:
        return None
    counts = entry["parameters"]
    return facts_of_config(
        entry["name"],
        entry["source"],
        entry["config"],
        counts["total"],
        counts["embeddings"],
        counts["experts"],
        entry["weights"],
        mla,
    )


def facts_of_config(
    name: str,
    source: str,
    config: Mapping[str, Any],
    total: int,
    embeddings: int,
    experts: int,
    weights: str,
    mla: MLA = "latent",
    geometry: ModelGeometry | None = None,
    held: Mapping[str, int] | None = None,
) -> ModelFacts:
    """Facts from the fields of a Hugging Face ``config.json`` and from counted parameters.

    ``geometry`` is used where it was measured; otherwise it follows from the fields. Raises ``ConfigError`` naming a
    field that is missing.
    """
    text = text_config(config)
    layers = layers_of(text, mla) if geometry is None else geometry.layers
    longest = int(text.get("max_position_embeddings") or 0)
    if longest <= 0:
        raise ConfigError(f"the configuration of '{name}' has no max_position_embeddings")
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    routed = int(text.get("n_routed_experts") or text.get("num_local_experts") or text.get("num_experts") or 0)
    chosen = int(text.get("num_experts_per_tok") or 0)
    share = chosen / routed if routed else 0.0
    active = total - experts + int(experts * share)
    # The input embedding is looked up, not multiplied; a tied one is multiplied as the output head.
    active -= 0 if text.get("tie_word_embeddings", False) else hidden * vocab
    inner = int(text.get("intermediate_size") or 4 * hidden)
    inner = max(inner, chosen * int(text.get("moe_intermediate_size") or inner)) if routed else inner
    return ModelFacts(
        name=name,
        source=source,
        geometry=geometry or ModelGeometry(name, layers, longest, vocab),
        parameters=Parameters(total, embeddings, experts, active),
        weights=weights,
        hidden=hidden,
        widest=inner,
        held=held or {},
    )


def _find(name: str) -> Mapping[str, Any] | None:
    wanted = name.strip().lower()
    short = wanted.rsplit("/", 1)[-1]  # a hub id: its owner says nothing here
    for entry in _table():
        if {wanted, short} & {entry["name"], *entry["aliases"]}:
            return entry
    return None


@cache
def _table() -> tuple[Mapping[str, Any], ...]:
    return tuple(json.loads(files("kvbits.planning").joinpath(TABLE).read_text(encoding="utf-8")))
