"""Tasks that are all record: find one value among many that look alike.

``kv-retrieval``: a JSON object of UUIDs (Liu et al., 2023, "Lost in the Middle", arXiv:2307.03172). ``lines``: numbered
lines (LongChat's line retrieval, Li et al., 2023). ``multikey``: sentences with magic numbers, every one a distractor
(RULER's multi-key retrieval, Hsieh et al., 2024, arXiv:2404.06654). With the published file its own keys and values
fill the context, from one record to the next; without one they are drawn.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator

from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.base import SLACK, Material, depths_of, fill
from kvbits.evaluation.tasks.files import jsonl
from kvbits.evaluation.tasks.words import names, number

KV_FILE, LINES_FILE = "kv-retrieval-*.jsonl*", "longchat_lines_*.jsonl*"
Pairs = Iterator[tuple[str, str]]


def kv_retrieval(material: Material) -> list[Probe]:
    """The value of a UUID in a JSON object."""

    def pairs(sample: int) -> Pairs:
        if KV_FILE in material.files:
            records = jsonl(material.files[KV_FILE], "ordered_kv_records")
            return ((k, v) for record in records[sample:] for k, v in record["ordered_kv_records"])
        source = material.random("kv-retrieval", sample)
        return ((_uuid(source), _uuid(source)) for _ in iter(int, 1))

    head = "The JSON object below holds keys and their values.\n\n{"
    tail = '}}\n\nThe value of the key "{key}" is'
    return _probes(material, "kv-retrieval", pairs, head, '"{key}": "{value}"', ",\n ", tail, ' "{value}"')


def lines(material: Material) -> list[Probe]:
    """The number that a line holds."""

    def pairs(sample: int) -> Pairs:
        if LINES_FILE in material.files:
            records = jsonl(material.files[LINES_FILE], "prompt")
            return (_line(text) for r in records[sample:] for text in r["prompt"].split("\n") if _is_line(text))
        source = material.random("lines", sample)
        return ((name, number(source)) for name in names(source))

    head = "Below is a record of lines. Each has a name and a register content, which is a number.\n\n"
    tail = "\n\nThe record is over. The register content of line {key} is"
    return _probes(
        material, "lines", pairs, head, "line {key}: REGISTER_CONTENT is <{value}>", "\n", tail, " <{value}>"
    )


def multikey(material: Material) -> list[Probe]:
    """One magic number among a context full of them."""

    def pairs(sample: int) -> Pairs:
        source = material.random("multikey", sample)
        return ((name, number(source, 7)) for name in names(source))

    head = "Some special magic numbers are hidden in the text below. Remember them.\n\n"
    tail = "\n\nThe special magic number for {key} mentioned in the text is"
    template = "One of the special magic numbers for {key} is: {value}."
    return _probes(material, "multikey", pairs, head, template, "\n", tail, " {value}")


def _probes(
    material: Material,
    task: str,
    pairs: Callable[[int], Pairs],
    head: str,
    template: str,
    joint: str,
    tail: str,
    gold: str,
) -> list[Probe]:
    probes = []
    length = material.longest
    for sample in range(material.samples):
        known: dict[str, str] = {}
        stream = ((k, v) for k, v in pairs(sample) if known.setdefault(k, v) is v)
        first = next(stream)
        used = material.size(head + (tail + gold).format(key=first[0], value=first[1])) + SLACK
        records = fill(
            (template.format(key=k, value=v) for k, v in _chain(first, stream)),
            length - used - material.size(template.format(key=first[0], value=first[1])),
            material.size,
            task,
            joint=max(1, material.size(joint)),
        )
        shown = list(known.items())[: len(records)]
        text = head + joint.join(records)
        for depth in depths_of(material.depths):
            key, value = shown[round(depth * (len(shown) - 1))]
            probe = material.probe(
                task, str(sample), text + tail.format(key=key), gold.format(value=value), length, depth=depth
            )
            probes.append(probe)
    return probes


def _chain(first: tuple[str, str], rest: Pairs) -> Pairs:
    yield first
    yield from rest


def _is_line(text: str) -> bool:
    return text.startswith("line ") and ": REGISTER_CONTENT is <" in text


def _line(text: str) -> tuple[str, str]:
    name, _, value = text.removeprefix("line ").partition(": REGISTER_CONTENT is <")
    return name, value.strip().rstrip(">")


def _uuid(source: random.Random) -> str:
    return str(uuid.UUID(int=source.getrandbits(128), version=4))
