"""A model's configuration, tokenizer and weights, whatever format its files have."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
)
from transformers.utils import GENERATION_CONFIG_NAME

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models import gguf, hub
from kvbits.models.held import blank, held
from kvbits.models.locate import Source
from kvbits.models.quiet import quiet
from kvbits.models.safetensors.carried import carried_by
from kvbits.models.safetensors.file import read_headers
from kvbits.models.safetensors.weights import Weights
from kvbits.models.sampling import published
from kvbits.models.trust import trusted

_READ_ERRORS = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError, struct.error,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers and its readers raise for files that are missing, cut off or not what they claim to be."""

_PLAIN = {"F16", "BF16", "F32", "F64"}


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

    def weights(
        self, dtype: torch.dtype, attention: str | None = None, native: bool = False, packs: bool = False
    ) -> Callable[[], Any]:
        """Check the files of the weights by their headers; the result reads them, as ``dtype``, and gives the model.

        It is on the CPU and has the attention implementation ``attention``. ``native`` leaves weights in bits that the
        kernels can multiply as they are (:class:`kvbits.models.packed.PackedLinear`); ``packs`` leaves parameters of
        layers that the caller packs in their files (:class:`kvbits.models.stored.StoredParameter`).
        """
        directory = self.directory()
        own = self._planned(dtype, attention, directory)
        if own is not None and directory is not None:
            return lambda: self._with_generation(own.read(native, packs), directory)
        if own is not None:
            return lambda: self._with_ends(own.read(native, packs))
        options: dict[str, Any] = {"dtype": dtype}
        if attention is not None:
            options["attn_implementation"] = attention
        if self._file is not None:
            options["quantization_config"] = GgufConfig(dequantize=True)
            return lambda: self._with_ends(self._read("weights", AutoModelForCausalLM, **options))
        return lambda: self._complete(options)

    def quantized(self) -> str | None:
        """In what form of fewer than 16 bits the files hold weights, by their headers; ``None`` for plain ones."""
        if self._file is not None:
            kinds = sorted({tensor.kind.name for tensor in self._file.tensors.values()} - _PLAIN)
            return ", ".join(kinds) or None
        carried = carried_by(self._name, self.configuration().to_dict())
        return None if carried is None else carried.layout

    def held(self) -> dict[str, int]:
        """Bytes of the weights by the form that they are asked for in (:data:`kvbits.config.WEIGHT_FORMATS`), as the
        CPU's kernels hold them in bfloat16. Of the files, headers are read; none is fetched."""
        path = Path(self._source.path)
        own = self._planned(torch.bfloat16, None, path if path.is_dir() and self._file is None else None)
        if own is None:
            return held(blank(self.configuration()), {})
        own.model.tie_weights()
        return held(own.model, own.forms())

    def _planned(
        self, dtype: torch.dtype, attention: str | None, directory: Path | None
    ) -> gguf.Weights | Weights | None:
        """What reads the weights here, by the files' headers; ``None`` where transformers has to."""
        if self._own:
            assert self._file is not None
            return gguf.Weights(self._file, self.configuration(), dtype, attention)
        if self._file is not None:
            return None
        config = self.configuration()
        carried = carried_by(self._name, config.to_dict())
        if directory is not None:
            stored = read_headers(directory)
            if not trusted(config):
                found = Weights(directory, stored, config, dtype, attention, carried)
                if found.whole:
                    return found
        if carried is not None:
            raise UnsupportedError(f"the weights of the model '{self._name}' are in bits that its own code has to read")
        return None

    def directory(self) -> Path | None:
        """Where the safetensors lie, from the hub if need be; ``None`` where the model has none there."""
        if self._file is not None:
            return None
        path = Path(self._source.path)
        if path.is_dir():
            return path
        with quiet():
            try:
                return hub.checkpoint(self._source)
            except _READ_ERRORS as error:
                raise self._unreadable("weights", error) from error

    def _with_generation(self, model: Any, directory: Path) -> Any:
        if (directory / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = self._read("generation configuration", GenerationConfig)
        return model

    def _complete(self, options: dict[str, Any]) -> Any:
        """By transformers, which would make up what the files do not hold."""
        model, info = self._read("weights", AutoModelForCausalLM, output_loading_info=True, **options)
        for name in sorted(info["missing_keys"]):
            raise ConfigError(f"the files of the model '{self._name}' ({self._source.path}) hold no tensor {name}")
        return model

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
            raise self._unreadable(what, error) from error

    def _unreadable(self, what: str, error: Exception) -> ConfigError:
        source, reason = self._source, " ".join(str(error).split())[:300]
        where = f"{source.path}/{source.gguf}" if source.gguf else source.path
        return ConfigError(
            f"cannot read the {what} of the model '{self._name}' ({where}): {type(error).__name__}: {reason}"
        )
