"""Text to token ids from many threads at once, and without tokenizing all of a text that can never be served.

A text is known to be too long from its bytes alone where every token stands for some of them (byte-level BPE), and from
its beginning with every tokenizer. So a prompt that is refused costs no more than the longest one that is taken.
"""

from __future__ import annotations

import json
import threading
from functools import cached_property
from typing import Any

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from kvbits.engine.limits import RequestLimits
from kvbits.engine.text import encode_rendered
from kvbits.errors import RequestError
from kvbits.models import LoadedModel

_KEEP_ALL = ("ByteLevel", "Split", "Digits", "Punctuation")
"""Pre-tokenizers that only cut a text, unless they are told to remove."""

_FIRST_LOOK = 1 << 14
"""Characters of a text that are always tokenized."""

_SLACK = 1024
"""Tokens by which a beginning may have more than the whole: a word that was cut, beyond twice the limit."""


class Encoder:
    """The tokenizer of one model. ``limits`` are the engine's."""

    def __init__(self, loaded: LoadedModel, limits: RequestLimits) -> None:
        self._loaded = loaded
        self._limits = limits
        self._lock = threading.Lock()
        tokenizer: Any = loaded.tokenizer
        self._inner: Any = None
        if tokenizer is not None and _is_its_backend(tokenizer):
            self._inner = tokenizer.backend_tokenizer
            # What the wrapper sets before every call; nobody may set it while another thread encodes.
            self._inner.no_truncation()
            self._inner.no_padding()
            self._inner.encode_special_tokens = tokenizer.split_special_tokens

    def prompt(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt. Raises ``RequestError`` as :meth:`check` does."""
        self.check(text, add_special_tokens)
        return self.ids(text, add_special_tokens)

    def chat(self, rendered: str, split: bool) -> list[int]:
        """Token ids of what a chat template gave; ``split``: of texts in which control tokens were hidden.

        Raises ``RequestError`` as :meth:`check` does.
        """
        self.check_chat(rendered, split)
        return self.chat_ids(rendered, split)

    def check_chat(self, rendered: str, split: bool) -> None:
        """As :meth:`check`, of what a chat template gave."""
        self.check(self._loaded.control_tokens.restore(rendered) if split else rendered, add_special_tokens=False)

    def chat_ids(self, rendered: str, split: bool) -> list[int]:
        """As :meth:`chat`, however long."""

        def plain(text: str) -> list[int]:
            return self.ids(text, add_special_tokens=False)

        return encode_rendered(self._loaded, rendered, plain) if split else plain(rendered)

    def check(self, text: str, add_special_tokens: bool) -> None:
        """Raise ``RequestError`` when it can be seen without tokenizing all of it that ``text`` is too long."""
        most = min(self._limits.context, self._limits.pool)
        if self.longest is not None and len(text) > self.longest * most:
            self._limits.check_size(-(-len(text.encode()) // self.longest), at_least=True)
        cut = max(_FIRST_LOOK, 8 * most)
        while 2 * cut < len(text):
            if len(self.ids(text[:cut], add_special_tokens)) > 2 * most + _SLACK:
                self._limits.check_size(most + 1, at_least=True)
            cut *= 2

    def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of any text, however long."""
        if self._inner is not None:
            # The call for a batch lets other threads run, the one for a text does not.
            return list(self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        tokenizer = self._loaded.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self._loaded.name} has no tokenizer; give prompts as token ids")
        with self._lock:
            return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    @cached_property
    def longest(self) -> int | None:
        """The bytes of the longest token; ``None`` where a token, or none at all, may stand for any number of bytes."""
        inner = self._inner
        if inner is None or inner.normalizer is not None or not isinstance(inner.model, BPE):
            return None
        added = inner.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip for token in added) or not _keeps_all(inner.pre_tokenizer):
            return None
        vocab = inner.get_vocab()
        # Bytes that are no token vanish, or become one unknown token with those beside them.
        if not vocab.keys() >= set(ByteLevel.alphabet()):
            return None
        # Each character of such a token is a byte.
        return max(*map(len, vocab), *(len(token.content.encode()) for token in added), 1)


def _is_its_backend(tokenizer: Any) -> bool:
    """Whether a call is nothing more than its Rust tokenizer's; a class of a model's own may do more."""
    methods = (type(tokenizer).__call__, getattr(type(tokenizer), "_encode_plus", None))
    shared = all(getattr(method, "__module__", "").startswith("transformers.tokenization_utils") for method in methods)
    return bool(tokenizer.is_fast) and shared


def _keeps_all(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    cuts = all(step["type"] in _KEEP_ALL and step.get("behavior") != "Removed" for step in steps)
    return cuts and any(step["type"] == "ByteLevel" for step in steps)
