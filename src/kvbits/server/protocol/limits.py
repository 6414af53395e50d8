"""The most that one request may ask for; each is refused beyond it by name. ``docs/serving.md`` lists them.

What a step of the engine does for a sequence is bounded by them, whatever a client sends.
"""

from __future__ import annotations

MAX_STOPS = 16
"""Stop strings."""

MAX_STOP_LENGTH = 256
"""Characters of a stop string."""

MAX_STOP_TOKENS = 128
"""Entries of ``stop_token_ids``."""

MAX_LOGIT_BIAS = 1024
"""Entries of ``logit_bias``."""

MAX_SALT = 256
"""Characters of ``cache_salt``, which every sequence keeps."""

MAX_CHOICES = 128
"""``n``."""

MAX_PRIORITY = 1000
"""``priority``, either way."""

MAX_TOP_LOGPROBS = 20
"""Alternatives at each token of a chat."""

MAX_LOGPROBS = 5
"""Alternatives at each token of a completion."""

MAX_LOGPROB_TOKENS = 128
"""Entries of ``logprob_token_ids``, whose ranks are counted at each token."""

MAX_PROMPTS = 256
"""Prompts of one completion."""

MAX_GRAMMAR = 1 << 16
"""Characters of a grammar. The time to compile grows with their square: 250 KB took 24 seconds, 57 KB under three."""

MAX_BAD_WORDS = 128
"""Entries of ``bad_words``, each as long as a stop string may be."""

MAX_METADATA = 16
"""Pairs of ``metadata``."""

MAX_METADATA_TEXT = 512
"""Characters of each text in them."""

MAX_TOKENIZED = 1 << 17
"""Tokens that ``/tokenize`` counts, or as many as the context holds."""
