"""How the harness learns of the model.

lm-eval keeps its models in a registry of its own and looks for no entry points, so its ``lm_eval`` command cannot know
of a model in another package. ``python -m kvbits.lm_eval`` is that command after :func:`register`.
"""

from __future__ import annotations

from kvbits.errors import ConfigError

NAME = "kvbits"
"""What ``--model`` is called with."""

_TARGET = "kvbits.lm_eval.model:KVBitsLM"


def register() -> None:
    """Add the model to lm-eval's registry; again is harmless. Raises ``ConfigError`` where lm-eval is not installed."""
    try:
        from lm_eval import models  # noqa: F401 - its import fills the registry, which must come first
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is not installed ({error}): pip install 'kvbits[lm-eval]'") from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)
