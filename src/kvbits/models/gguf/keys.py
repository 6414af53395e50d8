"""The model's own keys of a GGUF file (``<architecture>.<key>``), each of which must be obeyed or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.gguf.file import GgufFile

SAYS_NOTHING = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})
"""Facts about where a model comes from, which change nothing in how it runs."""


class Keys:
    """Reads keys and remembers which; :meth:`refuse_rest` names one that nothing has read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._prefix = f"{file.architecture}."
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        return self._prefix + key

    def take(self, key: str) -> Any:
        """The value of ``key``, ``None`` without one. An array with one value for all layers is that value.

        Raises ``UnsupportedError`` for an array whose values differ.
        """
        self._read.add(key)
        value = self.file.metadata.get(self.name(key))
        if not isinstance(value, np.ndarray):
            return value
        if len(set(value.tolist())) > 1:
            raise UnsupportedError(
                f"{self.name(key)} of '{self.file.path.name}' differs by layer ({_shown(value)}); kvbits runs models "
                "whose layers have one shape"
            )
        return value[0].item() if len(value) else None

    def array(self, key: str) -> list[Any] | None:
        """All values of an array ``key``, ``None`` for anything else."""
        value = self.file.metadata.get(self.name(key))
        if not isinstance(value, np.ndarray):
            return None
        self._read.add(key)
        return list(value.tolist())

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.take(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(
                f"cannot read the GGUF file '{self.file.path}': {self.name(key)} is {value!r}; it must be a positive "
                "whole number"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.take(key)
        if value is None:
            return default
        if isinstance(value, (str, bool)) or not np.isfinite(value):
            raise ConfigError(
                f"cannot read the GGUF file '{self.file.path}': {self.name(key)} is {value!r}; it must be a number"
            )
        return float(value)

    def refuse(self, key: str, why: str) -> UnsupportedError:
        """The error for a ``key`` that is there and cannot be obeyed."""
        value = self.file.metadata.get(self.name(key))
        return UnsupportedError(f"{self.name(key)} of '{self.file.path.name}' is {_shown(value)}: {why}")

    def refuse_rest(self) -> None:
        """Raises ``UnsupportedError`` naming a key that says something and that nobody has read.

        Zero, false and nothing are what llama.cpp takes where a key is absent.
        """
        for full, value in self.file.metadata.items():
            key = full.removeprefix(self._prefix)
            if key == full or key in self._read or key in SAYS_NOTHING:
                continue
            if not np.any(value) if isinstance(value, np.ndarray) else not value:
                continue
            raise self.refuse(key, "kvbits does not know what this asks of the model, and leaves nothing out")


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        values = [str(x) for x in value[:8].tolist()]
        return ", ".join([*values, "..."] if len(value) > len(values) else values)
    return repr(value)
