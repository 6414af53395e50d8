"""Counts of tokens over all prompts and choices of a request."""

from __future__ import annotations

from typing import Any

from kvbits.engine.outputs import Delta


class Usage:
    """Adds up what deltas say."""

    def __init__(self, prompt_lengths: list[int]) -> None:
        self.prompt_tokens = sum(prompt_lengths)
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, prompt: int, delta: Delta, count_tokens: bool = True) -> None:
        """Account for a delta of the ``prompt``-th prompt."""
        if count_tokens:
            self.completion_tokens += len(delta.token_ids)
        if delta.index == 0:
            self._cached[prompt] = delta.num_cached_tokens

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached.values())

    def as_json(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
