"""A model's configuration, tokenizer and weights, whatever format its files have."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig

from kvbits.errors import ConfigError
from kvbits.models import gguf
from kvbits.models.locate import Source
from kvbits.models.quiet import quiet
from kvbits.models.sampling import published
from kvbits.models.shards import check_shards

_READ_ERRORS = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError, struct.error,
    SafetensorError,
)  # fmt: skip
"""What transformers and its readers raise for files that are missing, cut off or not what they claim to be."""


class Reader:
    """Reads the model ``name`` at ``source``.

    GGUF files of the families that :mod:`kvbits.models.gguf` knows are read there, others by transformers unless it
    would leave a part out. ``trust_remote_code`` lets the model's own Python code run. Methods raise ``ConfigError``
    for what cannot be read, ``UnsupportedError`` for what cannot be run.
    """

    def __init__(self, name: str, source: Source, trust_remote_code: bool = False) -> None:
        self._name, self._source, self._trust = name, source, trust_remote_code
        self._file = gguf.GgufFile(Path(source.path) / source.gguf) if source.gguf else None
        self._own = self._file is not None and gguf.family_of(self._file) is not None
        self._config: PreTrainedConfig | None = None
        if self._file is not None and not self._own:
            gguf.refuse_dropped(self._file)

    def configuration(self) -> PreTrainedConfig:
        """The model's configuration; no weights are read."""
        if self._config is None:
            if self._own:
                assert self._file is not None
                self._config = gguf.configuration(self._file)
            else:
                self._config = self._read("configuration", AutoConfig)
        return self._config

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self._own:
            assert self._file is not None
            return gguf.read_tokenizer(self._file)
        return self._read("tokenizer", AutoTokenizer)

    def weights(self, dtype: torch.dtype, attention: str | None = None) -> Callable[[], Any]:
        """Check the files of the weights by their headers; the result reads them, as ``dtype``, and gives the model.

        It is on the CPU and has the attention implementation ``attention``.
        """
        if self._own:
            assert self._file is not None
            read = gguf.Weights(self._file, self.configuration(), dtype, attention).read
            return lambda: self._with_ends(read())
        options: dict[str, Any] = {"dtype": dtype}
        if attention is not None:
            options["attn_implementation"] = attention
        if self._file is not None:
            options["quantization_config"] = GgufConfig(dequantize=True)
        elif self._source.offline:
            check_shards(Path(self._source.path))
        return lambda: self._with_ends(self._read("weights", AutoModelForCausalLM, **options))

    def _with_ends(self, model: Any) -> Any:
        """Add the ends of a turn that a GGUF file names beside EOS, and how its publisher samples."""
        if self._file is not None and model.generation_config is not None:
            model.generation_config.eos_token_id = self._ends(model.generation_config.eos_token_id)
            fields = published(self._file)
            model.generation_config.update(**fields, **({"do_sample": True} if fields else {}))
        return model

    def _ends(self, known: int | list[int] | None) -> int | list[int] | None:
        assert self._file is not None
        found = [known] if isinstance(known, int) else list(known or ())
        found += [id for key in ("eot", "eom") if (id := self._file.token_id(f"{key}_token_id")) is not None]
        found = list(dict.fromkeys(found))
        return found if len(found) > 1 else known if not found else found[0]

    def _read(self, what: str, kind: Any, **options: Any) -> Any:
        source = self._source
        if source.gguf:
            options["gguf_file"] = source.gguf
        try:
            with quiet():
                return kind.from_pretrained(
                    source.path, local_files_only=source.offline, trust_remote_code=self._trust, **options
                )
        except _READ_ERRORS as error:
            if "trust_remote_code" in str(error):
                raise ConfigError(
                    f"the {what} of the model '{self._name}' needs Python code that comes with it ({source.path}); "
                    "read that code, and give --trust-remote-code (trust_remote_code=True) to run it"
                ) from error
            reason = " ".join(str(error).split())[:300]
            where = f"{source.path}/{source.gguf}" if source.gguf else source.path
            raise ConfigError(
                f"cannot read the {what} of the model '{self._name}' ({where}): {type(error).__name__}: {reason}"
            ) from error
