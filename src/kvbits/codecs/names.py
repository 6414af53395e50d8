"""The names of the cache dtypes, and the strings that users write for a policy. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import groupby

from kvbits.config import AUTO, LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class Dtype:
    """What head sizes of keys and of values must be multiples of, and what makes the scheme: the function of that name
    in :mod:`kvbits.codecs.schemes`, with these arguments."""

    key_multiple: int
    value_multiple: int
    make: str
    arguments: tuple[int, ...] = ()


DTYPES: dict[str, Dtype] = {
    "bf16": Dtype(16, 16, "raw"),
    "int8": Dtype(16, 16, "int8"),
    "int8h": Dtype(16, 16, "nibbles"),
    "fp8": Dtype(16, 16, "float8", (3,)),
    "fp8_e4m3": Dtype(16, 16, "float8", (3,)),
    "fp8_e5m2": Dtype(16, 16, "float8", (2,)),
    "int6": Dtype(16, 16, "integer", (6,)),
    "int5": Dtype(32, 32, "integer", (5,)),
    "int4": Dtype(16, 16, "integer", (4,)),
    "int3": Dtype(32, 32, "integer", (3,)),
    "int2": Dtype(16, 16, "integer", (2,)),
    "nf4": Dtype(16, 16, "codebook", (4,)),
    "nf3": Dtype(32, 32, "codebook", (3,)),
    "nf2": Dtype(16, 16, "codebook", (2,)),
    "int4b32": Dtype(16, 32, "blocks", (4, 32)),
    "int4b64": Dtype(16, 64, "blocks", (4, 64)),
    "int3b32": Dtype(32, 32, "blocks", (3, 32)),
    "int2b32": Dtype(16, 32, "blocks", (2, 32)),
    "mix8_4": Dtype(64, 16, "mixed", (8, 4)),
    "mix8_2": Dtype(64, 16, "mixed", (8, 2)),
    "mix4_2": Dtype(64, 16, "mixed", (4, 2)),
}
"""Every dtype name that a policy may use: one line a scheme."""

WIDE, WIDE_VALUES = 128, {"int4": "int4b64"}
"""Values of heads wider than this are stored as another dtype of about the same bits: Gemma 3 270M loses 0.0092 nats a
token with one scale for a head's 256 channels, 0.0072 with one for each 64."""


@dataclass(frozen=True)
class Pair:
    """The dtypes of a layer's keys and of its values."""

    key: str
    value: str

    @property
    def name(self) -> str:
        return self.key if self.key == self.value else f"{self.key}/{self.value}"


@dataclass(frozen=True)
class PolicyNames:
    """A policy in names: each layer's dtypes, and those of every sequence's first page where it has its own.

    ``name`` is the canonical string that :func:`parse_names` reads. ``layers`` is one for all where their number is
    not known; ``sink`` has as many.
    """

    name: str
    layers: tuple[Pair, ...]
    sink: tuple[Pair, ...] | None = None

    def fitted(self, geometry: ModelGeometry) -> PolicyNames:
        """The same for the head sizes of ``geometry``: :data:`WIDE_VALUES` (the first page's format stays)."""
        layers = tuple(_fitted(pair, layer) for pair, layer in zip(self.layers, geometry.layers, strict=True))
        if layers == self.layers:
            return self
        name = "+".join([_name_of(layers), *self.name.split("+")[1:]])
        return replace(self, name=name, layers=layers)

    def check(self, geometry: ModelGeometry) -> None:
        """Raise ``UnsupportedError`` where a layer's head size does not fit its dtype."""
        for pairs in (self.layers, self.sink or ()):
            for index, (pair, layer) in enumerate(zip(pairs, geometry.layers, strict=bool(pairs))):
                key, value = DTYPES[pair.key].key_multiple, DTYPES[pair.value].value_multiple
                value = key if layer.latent else value
                if layer.latent and pair.key != pair.value:
                    reason = "a latent is key and value at once, so name one dtype for both"
                    raise UnsupportedError(f"layer {index} cannot be stored as '{pair.name}': {reason}")
                for multiple, dim in ((key, layer.key_dim), (value, layer.value_dim)):
                    if dim % multiple:
                        reason = f"head size {dim} is not a multiple of {multiple}"
                        raise UnsupportedError(f"layer {index} cannot be stored as '{pair.name}': {reason}")


def _fitted(pair: Pair, layer: LayerGeometry) -> Pair:
    value = WIDE_VALUES.get(pair.value, pair.value)
    wide = layer.value_dim > WIDE and layer.value_dim % DTYPES[value].value_multiple == 0 and not layer.latent
    return replace(pair, value=value) if wide else pair


def _name_of(layers: tuple[Pair, ...]) -> str:
    """What :func:`parse_names` reads as ``layers``."""
    if len(set(layers)) == 1:
        return layers[0].name
    parts, first = [], 0
    for name, run in groupby(pair.name for pair in layers):
        last = first + len(list(run)) - 1
        parts.append(f"{first}:{name}" if first == last else f"{first}-{last}:{name}")
        first = last + 1
    return ",".join(parts)


def parse_names(text: str, num_layers: int | None) -> PolicyNames:
    """Read ``--kv-cache-dtype``; see :func:`kvbits.codecs.parse_policy` for what may be written.

    Without ``num_layers`` only what holds for every model is checked. Raises ``ConfigError`` with the part that is
    wrong.
    """
    text = text.strip().lower()
    if not text:
        raise ConfigError(f"the KV cache dtype is empty; choose from {', '.join(DTYPES)}")
    text, plus, suffix = text.partition("+")
    if plus:
        if not suffix.startswith("sink:"):
            raise ConfigError(f"'+{suffix}' in the policy '{text}+{suffix}' is not +sink:DTYPE")
        rest = parse_names(text, num_layers)
        sink = _pair(suffix.removeprefix("sink:"), suffix)
        return PolicyNames(f"{rest.name}+{suffix}", rest.layers, (sink,) * len(rest.layers))
    if ":" not in text:
        return PolicyNames(text, (_pair(text, text),) * (num_layers or 1))
    layers: dict[int, Pair] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*:\s*([^:]+)", part)
        if not match:
            raise ConfigError(f"'{part}' in the policy '{text}' is not LAYER:DTYPE or FIRST-LAST:DTYPE")
        first = int(match.group(1))
        last = int(match.group(2) or first)
        if first > last or (num_layers is not None and last >= num_layers):
            bound = "ends before it begins" if num_layers is None else f"the model's layers are 0 to {num_layers - 1}"
            raise ConfigError(f"'{part}' in the policy '{text}': {bound}")
        pair = _pair(match.group(3), text)
        for index in range(first, last + 1) if num_layers is not None else ():
            if index in layers:
                raise ConfigError(f"the policy '{text}' names layer {index} twice")
            layers[index] = pair
    if num_layers is None:
        return PolicyNames(text, (pair,))
    missing = [str(i) for i in range(num_layers) if i not in layers]
    if missing:
        raise ConfigError(f"the policy '{text}' says nothing of layer {', '.join(missing)}")
    return PolicyNames(text, tuple(layers[i] for i in range(num_layers)))


def _pair(text: str, policy: str) -> Pair:
    names = [part.strip() for part in re.split("[,/]", text)]
    if len(names) > 2:
        raise ConfigError(f"'{text}' names {len(names)} dtypes; write one, or one for keys and one for values")
    for name in names:
        if name == AUTO:
            raise ConfigError(
                f"the KV cache dtype '{AUTO}' is chosen when serve, generate, chat, cache or kvbits.LLM start, and "
                f"stands alone; here name one: {', '.join(DTYPES)}"
            )
        if name not in DTYPES:
            where = "" if policy == name else f" in '{policy}'"
            raise ConfigError(f"unknown KV cache dtype '{name}'{where}; choose from {', '.join(DTYPES)}")
    return Pair(names[0], names[-1])
