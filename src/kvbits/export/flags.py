"""A policy in the options of another engine: the nearest that it can express, and what it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvbits.codecs import Codec, Policy
from kvbits.errors import ConfigError
from kvbits.export.engines import ENGINES, CacheDtype, Engine, Side

FEWER = 3.0
"""How much worse a bit less than the policy's is than a bit more: the first costs quality, the second only memory."""


@dataclass(frozen=True)
class Translation:
    """One engine's command line (``arguments``) and configuration (``config``), with what they leave out.

    ``key_bits`` and ``value_bits`` are the means over the layers that the engine would really use, scales not counted;
    ``lost`` says in sentences how this differs from the policy; empty when nothing is lost.
    """

    engine: str
    title: str
    arguments: tuple[str, ...]
    config: dict[str, Any]
    what: str
    needs: str
    key_bits: float
    value_bits: float
    lost: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "arguments": list(self.arguments), "lost": list(self.lost)}


def translate(policy: Policy, engine: str, calibrated: bool = False, places: Sequence[int] = ()) -> Translation:
    """``policy`` in the options of ``engine``; ``calibrated``: its pages are rounded as a calibration says.

    ``places``: the model's numbers of the policy's layers, where recurrent ones stand between. Raises ``ConfigError``
    for an engine that nobody knows.
    """
    known = ENGINES.get(engine.strip().lower())
    if known is None:
        raise ConfigError(f"unknown engine '{engine}'; choose from {', '.join(ENGINES)}")
    keys = [_bits(scheme.key) for scheme in policy.layers]
    values = [_bits(scheme.value) for scheme in policy.layers]
    by_channel = any(_bits(s.key) < 8 and getattr(s.key, "per", "") == "channel" for s in policy.layers)
    never = _never(known, policy, calibrated or policy.rounding is not None, by_channel)
    if not known.sides:
        return _of_dtypes(known, keys, values, never, places or range(len(keys)))
    found = _of_sides(known, keys, values, never)
    if by_channel and known.keys_by_channel:
        name, value = known.keys_by_channel
        return replace(found, config={**found.config, name: value})
    return found


def _bits(codec: Codec) -> int:
    """The code's own width: scales are not counted on either side of the comparison."""
    return int(getattr(codec, "bits", 16))


def _of_dtypes(
    engine: Engine, keys: Sequence[int], values: Sequence[int], never: Sequence[str], places: Sequence[int]
) -> Translation:
    pairs = list(zip(keys, values, strict=True))
    plain = {i for i, pair in enumerate(pairs) if engine.skips_layers and min(pair) >= 16}
    if len(plain) == len(pairs):
        plain = set()

    def stored(dtype: CacheDtype) -> list[tuple[float, float]]:
        """Bits of every layer's keys and values."""
        ends = {i for i in range(len(pairs)) if min(i, len(pairs) - 1 - i) < dtype.edges}
        return [(16.0, 16.0) if i in plain | ends else (dtype.key_bits, dtype.value_bits) for i in range(len(pairs))]

    def price(dtype: CacheDtype) -> float:
        got = zip(pairs, stored(dtype), strict=True)
        return sum(_price(k, key) + _price(v, value) for (k, v), (key, value) in got)

    best = min(engine.dtypes, key=price)
    if best.key_bits >= 16:
        plain = set()
    real = stored(best)
    lost = [*_differences("keys", keys, [k for k, _ in real]), *_differences("values", values, [v for _, v in real])]
    return Translation(
        engine.name,
        engine.title,
        _arguments(engine.name, best.name, [places[i] for i in sorted(plain)]),
        {},
        best.what,
        best.needs,
        _mean(k for k, _ in real),
        _mean(v for _, v in real),
        (*lost, *never),
    )


def _of_sides(engine: Engine, keys: Sequence[int], values: Sequence[int], never: Sequence[str]) -> Translation:
    key, value = (min(engine.sides, key=lambda s: sum(_price(b, s.bits) for b in bits)) for bits in (keys, values))
    lost = [
        *_differences("keys", keys, [key.bits] * len(keys)),
        *_differences("values", values, [value.bits] * len(values)),
    ]
    arguments, config = _of_pair(engine.name, key, value)
    needs = "flash attention (-fa on)" if engine.name == "llama.cpp" and value.bits < 16 else ""
    what = f"keys: {key.what}; values: {value.what}"
    return Translation(engine.name, engine.title, arguments, config, what, needs, key.bits, value.bits, (*lost, *never))


def _price(wanted: float, got: float) -> float:
    return (got - wanted) if got >= wanted else FEWER * (wanted - got)


def _arguments(engine: str, name: str, skipped: Sequence[int]) -> tuple[str, ...]:
    if engine == "lmdeploy":
        return ("--quant-policy", name)
    skip = ("--kv-cache-dtype-skip-layers", *map(str, skipped)) if skipped else ()
    return ("--kv-cache-dtype", name, *skip)


def _of_pair(engine: str, key: Side, value: Side) -> tuple[tuple[str, ...], dict[str, Any]]:
    if engine == "llama.cpp":
        flash = ("-fa", "on") if value.bits < 16 else ()
        return ("-ctk", key.name, "-ctv", value.name, *flash), {}
    return (), {"KEY_CACHE_PRECISION": key.name, "VALUE_CACHE_PRECISION": value.name}


def _differences(what: str, wanted: Sequence[float], got: Sequence[float]) -> list[str]:
    """Sentences such as ``keys of layers 0-3 have 8 bits in the policy and 4 here``."""
    found: dict[tuple[float, float], list[int]] = {}
    for layer, pair in enumerate(zip(wanted, got, strict=True)):
        if pair[0] != pair[1]:
            found.setdefault(pair, []).append(layer)
    whole = len(wanted)
    return [
        f"{what} of {'all layers' if len(layers) == whole else _named(layers)} have {a:g} bits in the "
        f"policy and {b:g} here"
        for (a, b), layers in found.items()
    ]


def _named(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}"


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _never(engine: Engine, policy: Policy, calibrated: bool, by_channel: bool) -> list[str]:
    """What no option of the engine can say."""
    found = []
    if policy.sink is not None and policy.sink != policy.layers:
        (name, _), *_ = Counter(scheme.name for scheme in policy.sink).most_common(1)
        found.append(f"the first page of a sequence ({name} in the policy) is stored as all others")
    if calibrated:
        found.append(f"calibrated rounding: {engine.title} rounds to nearest")
    if by_channel and engine.keys_by_channel is None:
        found.append("scales of keys are not per channel of a page")
    found.append("the newest tokens are not kept in 16 bit until their page is full")
    return found


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return sum(listed) / len(listed)
