"""Which prompts begin alike, from a request's body alone: no tokenizer where requests are routed.

A prompt becomes text that only grows at its end as a conversation goes on, the text becomes blocks, and a chain of
hashes names each block together with all before it: equal hashes mean equal beginnings. Replica names are strings here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from kvbits.server.body import count_values
from kvbits.server.errors import ApiError

BLOCK_CHARS = 64
"""Characters of a block: about a quarter of a page of English text."""

MAX_BLOCKS = 1 << 14
"""Blocks by which a prompt is known: a MiB of text. A longer one would make a router forget all others."""

MAX_VALUES = 1 << 20
"""Values of a body that is looked at."""


def prompt_text(body: bytes) -> str | None:
    """The part of an OpenAI request that decides its tokens, or ``None`` where there is none.

    A body of which a replica would not make objects is not looked at here either.
    """
    try:
        count_values(body, MAX_VALUES)
        request = from_json(body)
    except (ValueError, ApiError):
        return None
    if not isinstance(request, Mapping):
        return None
    head = _canonical([request.get("cache_salt"), request.get("tools")])
    messages, prompt = request.get("messages"), request.get("prompt")
    if isinstance(messages, list):
        return head + "".join(map(_canonical, messages))
    if isinstance(prompt, str):
        return head + prompt
    if isinstance(prompt, list):
        first = prompt[0] if prompt and isinstance(prompt[0], str | list) else prompt
        return head + (first if isinstance(first, str) else "".join(f"{token}," for token in first))
    return None


def block_hashes(text: str, owner: bytes = b"") -> tuple[bytes, ...]:
    """A hash for each full block of ``text``, which covers all before it too, and whose text it is.

    For ``MAX_BLOCKS`` at most.
    """
    found, parent = [], owner
    for start in range(0, min(len(text), MAX_BLOCKS * BLOCK_CHARS) - BLOCK_CHARS + 1, BLOCK_CHARS):
        block = text[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass")
        parent = hashlib.blake2b(parent + block, digest_size=12).digest()
        found.append(parent)
    return tuple(found)


@dataclass
class _Block:
    """Who was given a block, the latest last, and whether any prompt went on after it."""

    owners: OrderedDict[str, None] = field(default_factory=OrderedDict)
    continued: bool = False


@dataclass(frozen=True)
class Recorded:
    """What one prompt changed in a :class:`PrefixMap`: blocks that are new to ``replica``, and ends that it went on."""

    replica: str
    blocks: tuple[bytes, ...]
    ends: tuple[bytes, ...]


class PrefixMap:
    """Which replicas were given which blocks, the ``capacity`` most recently used of them.

    ``held`` counts the blocks of each replica.
    """

    def __init__(self, capacity: int) -> None:
        self.held: Counter[str] = Counter()
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def record(self, blocks: Sequence[bytes], replica: str) -> Recorded:
        """``replica`` computes or holds these blocks from now on, unless :meth:`forget` is given what this returns."""
        added, ends = [], []
        # The beginning of a text is more recently used than its end, which is forgotten first.
        for number in range(len(blocks) - 1, -1, -1):
            key, goes_on = blocks[number], number + 1 < len(blocks)
            known = key in self._blocks
            block = self._blocks.setdefault(key, _Block())
            if replica not in block.owners:
                added.append(key)
            if known and goes_on and not block.continued:
                ends.append(key)
            block.owners[replica] = None
            block.owners.move_to_end(replica)
            block.continued |= goes_on
            self._blocks.move_to_end(key)
        self.held[replica] += len(added)
        while len(self._blocks) > self._capacity:
            self.held.subtract(list(self._blocks.popitem(last=False)[1].owners))
        return Recorded(replica, tuple(added), tuple(ends))

    def forget(self, recorded: Recorded) -> None:
        """The replica refused that prompt: it holds nothing of it, and a conversation still ends where it did."""
        for key in recorded.blocks:
            block = self._blocks.get(key)
            if block is not None and recorded.replica in block.owners:
                del block.owners[recorded.replica]
                self.held[recorded.replica] -= 1
                if not block.owners:
                    del self._blocks[key]
        for key in recorded.ends:
            if key in self._blocks:
                self._blocks[key].continued = False

    def holder(self, blocks: Sequence[bytes], alive: Collection[str]) -> tuple[str | None, bool]:
        """The replica among ``alive`` that holds most of ``blocks``, the latest where several do.

        The second value: whether ``blocks`` go on where an earlier prompt ended. Otherwise they leave it half way, as a
        new conversation does that has only its system prompt in common with others.
        """
        for key in reversed(blocks):
            block = self._blocks.get(key)
            for replica in reversed(block.owners if block is not None else ()):
                if block is not None and replica in alive:
                    return replica, not block.continued
        return None, False


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
