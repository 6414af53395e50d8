"""One look for each cache dtype in every picture: a hue a family, darker with more bits, and a dash a family."""

from __future__ import annotations

import zlib

_LOOKS = {
    "bf16": ("#6b7280", "solid"),
    "int8": ("#14406f", "solid"),
    "int6": ("#22609f", "solid"),
    "int5": ("#3d82c4", "solid"),
    "int4": ("#5ba3e0", "solid"),
    "int3": ("#8cc2ee", "solid"),
    "int2": ("#b5d8f5", "solid"),
    "int8h": ("#0e7490", "dashdot"),
    "fp8": ("#5b21b6", "dashed"),
    "fp8_e4m3": ("#7c3aed", "dashed"),
    "fp8_e5m2": ("#a78bfa", "dashed"),
    "nf4": ("#166534", "dashed"),
    "nf3": ("#34a05f", "dashed"),
    "nf2": ("#86d5a2", "dashed"),
    "int4b64": ("#b4460a", "dotted"),
    "int4b32": ("#9a3412", "dotted"),
    "int3b32": ("#e0752d", "dotted"),
    "int2b32": ("#f7b37d", "dotted"),
    "mix8_4": ("#881337", "dashdot"),
    "mix8_2": ("#d6336c", "dashdot"),
    "mix4_2": ("#f48fb1", "dashdot"),
}
_OTHERS = ("#111827", "#a38a2c", "#0f9d8a", "#b8405e", "#6d4c2f", "#4d5bd1", "#7a8b00", "#c2410c")
"""For policies and pairs; which one follows from the name."""


def colour_of(name: str) -> str:
    """``#rrggbb`` of a dtype or a policy, the same wherever it is drawn."""
    return _LOOKS[name][0] if name in _LOOKS else _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def dash_of(name: str) -> str:
    """matplotlib's line style."""
    return _LOOKS.get(name, ("", "solid"))[1]


def plotly_dash_of(name: str) -> str:
    """The same as plotly calls it."""
    return {"solid": "solid", "dashed": "dash", "dotted": "dot", "dashdot": "dashdot"}[dash_of(name)]
