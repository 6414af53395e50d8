"""Whether a configuration is of a class that came with a model, which is loaded only where that was allowed."""

from __future__ import annotations

from transformers import PreTrainedConfig

_PACKAGE = "transformers_modules"
"""Where transformers puts code that comes with models."""


def trusted(config: PreTrainedConfig) -> bool:
    """For ``trust_remote_code`` of a model of this configuration: what was allowed when the configuration was read.

    Never left open: transformers would ask on standard input.
    """
    return type(config).__module__.partition(".")[0] == _PACKAGE
