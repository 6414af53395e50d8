"""Real text in the place of what a trace only counts: equal blocks get equal tokens, others different ones."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.errors import ConfigError
from kvbits.replay.trace import TraceRequest
from kvbits.traces import BLOCK_TOKENS

_GOLDEN = 0.6180339887498949


class BlockText:
    """Cuts prompts from ``pieces``: the tokens of a text, or its characters with so many to a token.

    Block ``i`` begins at a place of its own in the text, so that ``len(pieces) - 512`` blocks are all different, and
    neighbours in number are far apart in the text. Raises ``ConfigError`` when the text is shorter than a block.
    """

    def __init__(self, pieces: Sequence[int] | str, per_token: float = 1.0) -> None:
        self._pieces = pieces
        self._block = round(BLOCK_TOKENS * per_token)
        self._per_token = per_token
        self._places = len(pieces) - self._block
        if self._places < 1:
            raise ConfigError(f"the text has less than one block of {BLOCK_TOKENS} tokens; give a longer one")
        self._stride = _coprime(round(self._places * _GOLDEN), self._places)
        self._fresh = 0

    def prompt(self, request: TraceRequest) -> list[int] | str:
        """The prompt of a request that has only a length: ``prompt_tokens`` tokens, or about as much text."""
        blocks = request.blocks or self._new(-(-request.prompt_tokens // BLOCK_TOKENS))
        parts = [self._cut(block) for block in blocks]
        length = round(request.prompt_tokens * self._per_token)
        if isinstance(self._pieces, str):
            return "".join(str(part) for part in parts)[:length]
        return [int(token) for part in parts for token in part][:length]

    def _cut(self, block: int) -> Sequence[int] | str:
        start = block * self._stride % self._places
        return self._pieces[start : start + self._block]

    def _new(self, count: int) -> list[int]:
        """Numbers of blocks that no trace names, so that prompts without hashes share nothing."""
        self._fresh += count
        return [-number for number in range(self._fresh - count + 1, self._fresh + 1)]


def _coprime(start: int, modulus: int) -> int:
    """The first number from ``start`` on that shares no divisor with ``modulus``."""
    from math import gcd

    number = max(1, start)
    while gcd(number, modulus) != 1:
        number += 1
    return number
