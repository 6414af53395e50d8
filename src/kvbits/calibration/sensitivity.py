"""What each layer's keys and values would lose in each dtype: the calibration's table in plain types."""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.calibration.fit import FittedCodec


def sensitivity(table: Sequence[Sequence[FittedCodec]]) -> dict[str, dict[str, list[float | None]]]:
    """``{dtype: {"key": [KL of layer 0, 1, ...], "value": [...]}}``, in predicted nats a token, rounded at best.

    ``table`` has keys before values, layer after layer; ``None`` stands where a dtype cannot store a layer.
    """
    names = list(dict.fromkeys(choice.name for row in table for choice in row))
    return {
        name: {
            side: [next((c.cost for c in row if c.name == name), None) for row in table[start::2]]
            for start, side in enumerate(("key", "value"))
        }
        for name in names
    }
