"""Which prompts begin alike, from a request's body alone: no tokenizer where requests are routed.

A prompt becomes text that only grows at its end as a conversation goes on, the text becomes blocks, and a chain of
hashes names each block together with all before it: equal hashes mean equal beginnings. Replica names are strings here.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

BLOCK_CHARS = 128
"""Characters of a block: about half a page of English text."""


def prompt_text(body: bytes) -> str | None:
    """The part of an OpenAI request that decides its tokens, or ``None`` where there is none."""
    try:
        request = json.loads(body)
    except ValueError:
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


def block_hashes(text: str) -> tuple[bytes, ...]:
    """A hash for each full block of ``text``, which covers all before it too."""
    found, parent = [], b""
    for start in range(0, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        block = text[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass")
        parent = hashlib.blake2b(parent + block, digest_size=12).digest()
        found.append(parent)
    return tuple(found)


class PrefixMap:
    """Which replicas were given which blocks, the ``capacity`` most recently used of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._owners: OrderedDict[bytes, OrderedDict[str, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def record(self, blocks: Sequence[bytes], replica: str) -> None:
        """``replica`` computes or holds these blocks from now on."""
        # The beginning of a text is more recently used than its end, which is forgotten first.
        for block in reversed(blocks):
            owners = self._owners.setdefault(block, OrderedDict())
            owners[replica] = None
            owners.move_to_end(replica)
            self._owners.move_to_end(block)
        while len(self._owners) > self._capacity:
            self._owners.popitem(last=False)

    def holder(self, blocks: Sequence[bytes], alive: Collection[str]) -> tuple[str | None, int]:
        """The replica among ``alive`` that holds most of ``blocks``, the latest where several do; and how many."""
        for number in range(len(blocks), 0, -1):
            for replica in reversed(self._owners.get(blocks[number - 1], OrderedDict())):
                if replica in alive:
                    return replica, number
        return None, 0


def choose(holder: str | None, loads: Mapping[str, int], imbalance: int) -> list[str]:
    """The replicas of ``loads`` (requests under way) in the order in which to try them.

    The holder is first unless it has more than ``imbalance`` requests more than the least loaded.
    """
    order = sorted(loads, key=lambda replica: loads[replica])
    if holder in loads and loads[holder] - loads[order[0]] <= imbalance:
        order.remove(holder)
        order.insert(0, holder)
    return order


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
