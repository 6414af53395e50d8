"""The configuration of a model from its GGUF file."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from kvbits.errors import ConfigError
from kvbits.models.gguf.fields import fields_of, known_family
from kvbits.models.gguf.file import GgufFile


def configuration(file: GgufFile) -> PreTrainedConfig:
    """transformers' configuration of the model in ``file``, whose family kvbits must know.

    Raises ``UnsupportedError`` naming a key that transformers' model cannot follow, ``ConfigError`` naming one that is
    missing or wrong.
    """
    family, fields = known_family(file), fields_of(file)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(family.model_type, **fields)
    # transformers checks values in classes of its own, whose errors derive from these
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers refuses the configuration of '{file.path}': {reason}") from error
    return config
