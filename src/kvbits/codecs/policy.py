"""Which scheme each layer uses, and the strings that users write for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbits.codecs import schemes as makers
from kvbits.codecs.base import Codec, LayerRounding, Scheme
from kvbits.codecs.names import DTYPES, Pair, PolicyNames, parse_names
from kvbits.codecs.raw import Raw
from kvbits.config import PAGE_TOKENS, ModelGeometry
from kvbits.errors import UnsupportedError

OPEN = Scheme(key=Raw(), value=Raw())
"""The format of every sequence's last page."""

SCHEMES: dict[str, Scheme] = {
    name: getattr(makers, dtype.make)(name, *dtype.arguments) for name, dtype in DTYPES.items()
}
"""Every dtype of :data:`kvbits.codecs.names.DTYPES` as codecs."""


@dataclass(frozen=True)
class Policy:
    """A scheme for each layer; ``name`` is the canonical string that :func:`parse_policy` reads, ``label`` what the
    user wrote (default: the name), which results are known by.

    ``sink`` are the schemes of every sequence's first page (``None``: those of all pages). ``rounding`` says, layer by
    layer, how sealed pages are rounded, where that was calibrated; ``name`` then identifies the calibration too, so
    that equal names mean equal bytes.
    """

    name: str
    layers: tuple[Scheme, ...]
    sink: tuple[Scheme, ...] | None = None
    rounding: tuple[LayerRounding, ...] | None = field(default=None, compare=False, repr=False)
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)

    def bits_per_element(self, geometry: ModelGeometry) -> float:
        """Stored bits per element of a sealed page, every parameter counted."""
        stored = 8 * sum(s.layer_bytes(g) for s, g in zip(self.layers, geometry.layers, strict=True))
        return stored / (PAGE_TOKENS * geometry.bytes_per_token_16bit() / 2)

    def check(self, geometry: ModelGeometry) -> None:
        """Raise ``UnsupportedError`` where a layer's head size does not fit its codec."""
        for schemes in (self.layers, self.sink or ()):
            for index, (scheme, layer) in enumerate(zip(schemes, geometry.layers, strict=bool(schemes))):
                reason = scheme.supports(layer)
                if reason:
                    raise UnsupportedError(f"layer {index} cannot be stored as '{scheme.name}': {reason}")


def parse_policy(text: str, num_layers: int) -> Policy:
    """Read ``--kv-cache-dtype``.

    ``"int4"``: every layer; ``"int8,int4"`` or ``"int8/int4"``: keys, values; ``"0-1:int8,2-29:int8/int4"``: by layer,
    every layer named once. ``"int4+sink:int8"``: the first page of every sequence, where attention sinks lie, is stored
    as the dtype after ``+sink:`` in all layers. Raises ``ConfigError`` with the part that is wrong.
    """
    return policy_from(parse_names(text, num_layers))


def policy_from(names: PolicyNames) -> Policy:
    """The codecs that ``names`` stand for."""
    sink = None if names.sink is None else tuple(map(_scheme, names.sink))
    return Policy(names.name, tuple(map(_scheme, names.layers)), sink)


def _scheme(pair: Pair) -> Scheme:
    key, value = SCHEMES[pair.key], SCHEMES[pair.value]
    return key if key is value else Scheme(key=key.key, value=value.value)


def codecs_in_use() -> dict[str, tuple[Codec, str]]:
    """Every (codec, side) of the registry by a readable name: what parametrized tests iterate over."""
    found: dict[str, tuple[Codec, str]] = {}
    for name, scheme in SCHEMES.items():
        found[f"{name}-key"] = (scheme.key, "key")
        found[f"{name}-value"] = (scheme.value, "value")
    return found
