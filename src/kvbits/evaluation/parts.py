"""The names of what may be evaluated. No torch."""

from __future__ import annotations

from kvbits.errors import ConfigError

FIDELITY, LAYERS, GENERATION, TOOLS, ARITHMETIC = "fidelity", "layers", "generation", "tools", "gsm8k"
TASK_NAMES = ("passkey", "needle", "kv-retrieval", "lines", "multikey", "variables", "common-words", "babi")
NAMES = (FIDELITY, LAYERS, *TASK_NAMES, GENERATION, TOOLS, ARITHMETIC)
"""Every part of the laboratory, in the order in which they run."""

_NEEDS_TEXT = (FIDELITY, LAYERS, GENERATION)


def parts_of(tasks: str, has_text: bool) -> tuple[str, ...]:
    """Read ``--tasks``: names with commas, or ``all``. Raises ``ConfigError`` for an unknown name or a missing text."""
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in asked if name not in (*NAMES, "all")]
    if unknown or not asked:
        what = f"unknown task '{unknown[0]}'" if unknown else "there is no task"
        raise ConfigError(f"{what}; choose from {', '.join(NAMES)}, or all")
    parts = NAMES if "all" in asked else tuple(name for name in NAMES if name in asked)
    lacking = [name for name in parts if name in _NEEDS_TEXT and not has_text]
    if lacking:
        raise ConfigError(f"the task '{lacking[0]}' needs a text; give --text FILE")
    return parts
