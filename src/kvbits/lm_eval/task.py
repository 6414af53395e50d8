"""For a task's YAML: ``process_docs: !function kvbits.lm_eval.task.unchanged`` makes ``--model kvbits`` known.

The harness resolves the functions of a task file given to ``--tasks`` before it looks up the model, so its plain
``lm_eval`` command finds kvbits where such a file names this function. Importing the module registers nothing.
"""

from __future__ import annotations

from typing import Any

from kvbits.lm_eval.registration import register


def _unchanged(documents: Any) -> Any:
    """A task's documents as they are."""
    return documents


def __getattr__(name: str) -> Any:
    """``unchanged``, and the model is registered. Raises ``ConfigError`` where lm-eval is not installed."""
    if name != "unchanged":
        raise AttributeError(f"module '{__name__}' has no '{name}'")
    register()
    return _unchanged
