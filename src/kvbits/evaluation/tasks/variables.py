"""Chains of assignments in dull text: which variables hold a value (RULER's variable tracking, arXiv:2404.06654)."""

from __future__ import annotations

import string
from itertools import cycle, pairwise

from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.base import SLACK, Material, fill, spread
from kvbits.evaluation.tasks.passkey import FILLER
from kvbits.evaluation.tasks.words import number

HOPS = 4
_HEAD = "Follow the chains of variable assignments that are hidden in the text below.\n\n"


def variables(material: Material) -> list[Probe]:
    """``depths`` chains of ``HOPS`` assignments in one document; each chain is asked for alone."""
    probes = []
    length = material.longest
    for sample in range(material.samples):
        source = material.random("variables", sample)
        count = material.depths
        pool = source.sample(
            [a + b + c for a in string.ascii_uppercase for b in "AEIOU" for c in "BDKLMNRT"], 5 * count
        )
        chains = [pool[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(count)]
        values = [number(source) for _ in chains]
        facts: list[tuple[float, str]] = []
        for chain, value in zip(chains, values, strict=True):
            places = sorted(source.random() for _ in chain)
            said = [f"VAR {chain[0]} = {value}."]
            said += [f"VAR {new} = VAR {old}." for old, new in pairwise(chain)]
            facts += zip(places, said, strict=True)
        used = material.size(_HEAD + " ".join(f for _, f in facts) + _tail(values[0]) + _gold(chains[0])) + SLACK
        parts = fill(cycle(FILLER), length - used, material.size, "variables", joint=0)
        text = _HEAD + " ".join(spread(parts, [f for _, f in facts], [p for p, _ in facts]))
        for index, (chain, value) in enumerate(zip(chains, values, strict=True)):
            probes.append(
                material.probe("variables", str(sample), text + _tail(value), _gold(chain), length, chain=index)
            )
    return probes


def _tail(value: str) -> str:
    return f"\n\nThe {HOPS + 1} variables that hold the value {value} are, in the order of the text: VAR"


def _gold(chain: list[str]) -> str:
    return " " + ", VAR ".join(chain)
