"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from kvbits.engine.outputs import Logprob, Logprobs

TokenBytes = Callable[[int], bytes]
_LOWEST = -9999.0
"""What JSON gets for a probability of zero."""


def chat_logprobs(
    tokens: Sequence[int], found: Sequence[Logprobs], top: int, name: TokenBytes, name_ids: bool = False
) -> list[dict[str, Any]]:
    """Entries of ``logprobs.content``: the chosen token and the ``top`` likeliest ones at each place.

    ``name_ids``: a token's name is ``token_id:`` and its id.
    """

    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        raw = name(token)
        text = f"token_id:{token}" if name_ids else raw.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob.logprob), "bytes": list(raw)}

    entries = []
    for token, at in zip(tokens, found, strict=True):
        best = sorted((item for item in at.items() if item[1].rank <= top), key=lambda item: item[1].rank)[:top]
        alternatives = [entry(other, logprob) for other, logprob in best]
        entries.append({**entry(token, at[token]), "top_logprobs": alternatives})
    return entries


def no_logprobs() -> dict[str, list[Any]]:
    """The ``logprobs`` object of a text completion of no tokens."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class CompletionLogprobs:
    """Grows the ``logprobs`` object of a text completion; ``top`` alternatives at each place.

    ``text_offset`` is where a token's text begins, in characters; a token inside a character has that character's
    place. ``hidden`` tokens are named, but the text does not show them.
    """

    def __init__(
        self,
        top: int,
        name: TokenBytes,
        hidden: Callable[[int], bool] = lambda token: False,
        name_ids: bool = False,
    ) -> None:
        self._top = top
        self._name_ids = name_ids
        self._name = name
        self._hidden = hidden
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def extend(
        self, tokens: Sequence[int], found: Sequence[Logprobs | None], text: str | None = None
    ) -> dict[str, Any]:
        """The object for the next ``tokens``; a place without a prediction (the first one) has ``None``.

        ``text``: an echoed prompt, which may lack what the tokenizer added (a first token, a first space).
        """
        result = no_logprobs()
        for token, at in zip(tokens, found, strict=True):
            result["tokens"].append(self._text(token))
            result["token_logprobs"].append(None if at is None else finite(at[token].logprob))
            result["top_logprobs"].append(None if at is None else self._likeliest(token, at))
            result["text_offset"].append(self._offset)
            self._offset += self._shown(token, text)
        if text is not None:
            self._offset = len(text)
        return result

    def _shown(self, token: int, text: str | None) -> int:
        """Characters that are complete with ``token``."""
        if text is None:
            return 0 if self._hidden(token) else len(self._characters.decode(self._name(token)))
        characters = self._characters.decode(self._name(token))
        # What the tokenizer added before the first word is in no echo.
        fitting = [c for c in (characters, characters.lstrip(" ")) if text.startswith(c, self._offset)]
        return len(fitting[0]) if fitting else 0

    def _likeliest(self, token: int, at: Logprobs) -> dict[str, float]:
        kept = [(t, p) for t, p in at.items() if p.rank <= self._top or t == token]
        return {self._text(other): finite(p.logprob) for other, p in sorted(kept, key=lambda item: item[1].rank)}

    def _text(self, token: int) -> str:
        if self._name_ids:
            return f"token_id:{token}"
        raw = self._name(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # As OpenAI writes part of a character, so that different parts stay different keys.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, _LOWEST)
