"""What a user asks of the plug-in: a policy, by the name of vLLM's KV dtype or in ``--additional-config``. No vLLM.

``--additional-config '{"kvbits": {"policy": "0-9:int8,10-29:int4"}}'`` takes every string that kvbits'
``--kv-cache-dtype`` takes, ``policy:DIR`` included, beside vLLM's ``--kv-cache-dtype auto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbits.codecs import SCHEMES
from kvbits.errors import ConfigError

PREFIX = "kvbits"
"""What the names of dtypes begin with, and the plug-in's key in vLLM's ``additional_config``."""

_KEYS = ("policy",)


@dataclass(frozen=True)
class Names:
    """vLLM's name of a KV dtype -> kvbits' (``dtypes``), and the name that stands for a policy given otherwise."""

    dtypes: Mapping[str, str]
    carrier: str

    def __contains__(self, name: object) -> bool:
        return name == self.carrier or name in self.dtypes


def policy_asked(cache_dtype: str, additional_config: Any, names: Names) -> str | None:
    """The policy that an engine's options name; ``None``: none of kvbits'.

    Raises ``ConfigError`` for options that contradict each other or that nobody knows.
    """
    text = _configured(additional_config)
    if text is None:
        if cache_dtype == names.carrier and cache_dtype not in names.dtypes:
            raise ConfigError(f"--kv-cache-dtype {cache_dtype} takes its policy from {_example()}, which has none")
        return names.dtypes.get(cache_dtype)
    if cache_dtype not in ("auto", names.carrier):
        raise ConfigError(
            f"--kv-cache-dtype {cache_dtype} and the policy '{text}' of --additional-config contradict each other; "
            f"leave one out (where the checkpoint asks for {cache_dtype}, write --kv-cache-dtype {names.carrier})"
        )
    return text


def _configured(additional_config: Any) -> str | None:
    if not isinstance(additional_config, Mapping) or PREFIX not in additional_config:
        return None
    own = additional_config[PREFIX]
    if not isinstance(own, Mapping):
        raise ConfigError(f"'{PREFIX}' in --additional-config is {own!r}; write {_example()}")
    unknown = sorted(set(own) - set(_KEYS))
    if unknown:
        raise ConfigError(f"'{unknown[0]}' in --additional-config is nothing that kvbits knows; write {_example()}")
    text = own.get("policy")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"the policy in --additional-config is {text!r}; choose from {', '.join(SCHEMES)}")
    return text


def _example() -> str:
    return """--additional-config '{"kvbits": {"policy": "int4"}}'"""
