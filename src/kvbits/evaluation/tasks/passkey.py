"""A number hidden at one depth of a document that repeats itself, as in Mohtashami & Jaggi, 2023 (arXiv:2305.16300)."""

from __future__ import annotations

from itertools import cycle

from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.base import SLACK, Material, depths_of, fill, spread
from kvbits.evaluation.tasks.words import number

FILLER = (
    "Waves roll in and waves roll out.",
    "The miller sets the sails to the wind.",
    "Bread rises slowly beside the oven.",
    "A cart goes up the hill and comes back down again.",
)
_HEAD = "One important number is hidden in the dull text below. Find it and remember it.\n\n"
_TAIL = "\n\nWhat is the pass key? The pass key is"


def passkey(material: Material) -> list[Probe]:
    """Depth by length; the documents of one length and sample differ only in where the sentence stands."""
    probes = []
    for length in material.lengths:
        for sample in range(material.samples):
            key = number(material.random("passkey", length, sample))
            fact = f"The pass key is {key}. Remember it: {key} is the pass key."
            used = material.size(_HEAD + fact + _TAIL + f" {key}.") + SLACK
            parts = fill(cycle(FILLER), length - used, material.size, "passkey", joint=0)
            # Deepest first: the others then find all that stands before their own sentence in the prefix cache.
            for depth in reversed(depths_of(material.depths)):
                body = " ".join(spread(parts, [fact], [depth]))
                probes.append(
                    material.probe(
                        "passkey", f"{length}-{sample}", _HEAD + body + _TAIL, f" {key}", length, depth=depth
                    )
                )
    return probes
