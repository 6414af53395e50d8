"""What a task says of a generation, in the engine's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbits.engine.params import SamplingParams
from kvbits.errors import RequestError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most tokens to generate, the first one given counts."""

_PASSED = ("top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = frozenset({"until", "do_sample", "temperature", *_LENGTHS, *_PASSED})


@dataclass(frozen=True)
class Generation:
    """``until``: strings that end a text and are not part of it."""

    until: tuple[str, ...]
    max_tokens: int
    params: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any], default_tokens: int) -> Generation:
        """Read a task's ``generation_kwargs``; ``do_sample: false``, or no temperature, is greedy.

        Raises ``RequestError`` naming an option that the engine does not have.
        """
        unknown = sorted(set(options) - _KNOWN)
        if unknown:
            raise RequestError(
                f"the task's generation_kwargs have '{unknown[0]}'; kvbits knows {', '.join(sorted(_KNOWN))}"
            )
        until = options.get("until") or ()
        lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            temperature = 0.0
        elif options.get("do_sample") and "temperature" not in options:
            temperature = 1.0
        params = {name: options[name] for name in _PASSED if options.get(name) is not None}
        return cls(
            until=(until,) if isinstance(until, str) else tuple(s for s in until if s),
            max_tokens=int(lengths[0] if lengths else default_tokens),
            params={**params, "temperature": temperature},
        )

    def sampling(self) -> SamplingParams:
        """For the engine."""
        return SamplingParams(max_tokens=self.max_tokens, stop=self.until, **self.params)

    def cut(self, text: str, end: str) -> str:
        """``text`` up to the first of ``until`` or of the model's end token spelled out."""
        for stop in (*self.until, end):
            if stop:
                text = text.split(stop)[0]
        return text
