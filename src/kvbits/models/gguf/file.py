"""A model in one GGUF file or in several (``name-00001-of-00003.gguf``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvbits.errors import ConfigError
from kvbits.models.gguf.header import Part, Strings, TensorInfo, Value
from kvbits.models.gguf.parts import first_part, parts_of


class GgufFile:
    """Metadata and tensors of a model in the GGUF format; see :mod:`kvbits.models.gguf.header` for the errors.

    ``metadata`` is that of the first file, ``parts`` how many there are. A part that is missing is
    named in a ``ConfigError``.
    """

    def __init__(self, path: Path) -> None:
        self.path = first_part(path)
        first = Part(self._existing(self.path))
        self.metadata, self.digest = first.metadata, first.digest
        self.tensors: dict[str, TensorInfo] = dict(first.tensors)
        count = self.integer("split.count", 1)
        paths = parts_of(self.path)
        self.parts = count
        if len(paths) != count:
            raise ConfigError(
                f"the GGUF file '{self.path}' is one of {count}; its name must end in -00001-of-{count:05}.gguf, and "
                "the others must lie beside it"
            )
        for path in paths[1:]:
            part = Part(self._existing(path))
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise ConfigError(f"tensor {name} is in '{part.path}' and in '{self.tensors[name].file.path}'")
                self.tensors[name] = tensor
        expected = self.integer("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise ConfigError(f"the parts of '{self.path}' have {len(self.tensors)} tensors of {expected}")

    @property
    def architecture(self) -> str:
        """``general.architecture``, the name under which the model's own keys are."""
        return self.string("general.architecture")

    def own(self, key: str) -> Value | None:
        """The model's own value of ``key``, such as ``context_length``; ``None`` without one."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def string(self, key: str, default: str | None = None) -> str:
        return str(self._typed(key, default, str, "a text"))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._typed(key, default, int, "a whole number"))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._typed(key, default, bool, "true or false"))

    def token_id(self, key: str) -> int | None:
        """The token id at ``tokenizer.ggml.<key>``; ``None`` without one or for one that the vocabulary has not."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        known = len(tokens) if isinstance(tokens, Strings) else 1 << 31
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < known else None

    def strings(self, key: str) -> Strings | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, Strings):
            raise ConfigError(f"cannot read the GGUF file '{self.path}': {key} is no array of texts")
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise ConfigError(f"cannot read the GGUF file '{self.path}': {key} is no array of numbers")
        return value

    def _typed(self, key: str, default: Any, kind: type, what: str) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise ConfigError(f"cannot read the GGUF file '{self.path}': it has no {key}")
        if not isinstance(value, kind):
            raise ConfigError(f"cannot read the GGUF file '{self.path}': {key} is {value!r}, not {what}")
        return value

    def _existing(self, path: Path) -> Path:
        if not path.is_file():
            raise ConfigError(f"the GGUF file '{path}' is missing: '{self.path.name}' is in several parts")
        return path
