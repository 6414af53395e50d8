"""The least that a session must hold: of every layer the pages that some later token sees, and nothing else.

The engine's frames hold a page of a group of layers, padded to one size, so it holds a little more.
"""

from __future__ import annotations

from kvbits.codecs import OPEN, Policy
from kvbits.config import PAGE_TOKENS, ModelGeometry


def windowed_session_bytes(geometry: ModelGeometry, policy: Policy, context: int) -> int:
    """Bytes of one running session of ``context`` tokens whose layers keep only pages that some later query sees.

    The open page is 16 bit in every layer. A sealed page is kept while its last token is within the window of the next
    token. A first page with a scheme of its own counts with that scheme where it is kept.
    """
    full = context // PAGE_TOKENS
    total = 0
    for index, layer in enumerate(geometry.layers):
        total += OPEN.layer_bytes(layer)
        kept = full
        if layer.window is not None:
            # the query at position `context` sees the positions from here on
            first = max(0, context - layer.window + 1)
            kept = full - min(full, first // PAGE_TOKENS)
        total += kept * policy.layers[index].layer_bytes(layer)
        if policy.sink is not None and full and kept == full:
            total += policy.sink[index].layer_bytes(layer) - policy.layers[index].layer_bytes(layer)
    return total


def has_windows(geometry: ModelGeometry) -> bool:
    """Whether any layer sees less than the model's whole context."""
    return any(layer.window is not None and layer.window < geometry.max_position for layer in geometry.layers)
