"""Made-up facts in a book, one at each depth, each asked for alone (the "needle in a haystack")."""

from __future__ import annotations

from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.base import SLACK, Material, depths_of, fill, from_place, paragraphs, spread
from kvbits.evaluation.tasks.words import NOUNS, number

_HEAD = "Read the text below. Codes of some stations are hidden in it.\n\n"


def needle(material: Material) -> list[Probe]:
    """Depth by length. All facts of a document are in it at once, so one prompt serves every depth."""
    parts = paragraphs(material.text)
    depths = depths_of(material.depths)
    probes = []
    for length in material.lengths:
        for sample in range(material.samples):
            source = material.random("needle", length, sample)
            places = [noun.capitalize() for noun in source.sample(NOUNS, len(depths))]
            codes = [number(source) for _ in depths]
            facts = [f"The code of the {p} station is {c}." for p, c in zip(places, codes, strict=True)]
            used = material.size(_HEAD + "\n\n".join(facts) + max((_tail(p) for p in places), key=len)) + SLACK
            book = fill(from_place(parts, sample, material.samples), length - used, material.size, "needle", joint=2)
            text = _HEAD + "\n\n".join(spread(book, facts, depths))
            for depth, place, code in zip(depths, places, codes, strict=True):
                name = f"{length}-{sample}"
                probes.append(material.probe("needle", name, text + _tail(place), f" {code}", length, depth=depth))
    return probes


def _tail(place: str) -> str:
    return f"\n\nQuestion: What is the code of the {place} station?\nAnswer: The code of the {place} station is"
