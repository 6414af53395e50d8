"""Which layers share a frame: groups of layers whose sealed pages are kept equally long.

A layer with a sliding window needs only its last pages. So layers are grouped by what the next token sees, and a frame
holds a sealed page of one group. One free list serves all groups if their frames are equal: each kind of layer is cut
into groups of about as many bytes (as vLLM's hybrid KV cache manager does), and what a group does not fill is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry

_PADDING = 0.03
"""The largest frames are taken that cost at most this share more than the best: fewer frames, shorter tables."""


@dataclass(frozen=True)
class LayerGroup:
    """``layers`` (indices, ascending) whose sealed pages lie in one frame and are given back together.

    ``kept``: sealed pages that the next token can see, older ones are given back; ``None``: all. ``first_frames``: of
    a sequence's first page.
    """

    layers: tuple[int, ...]
    kept: int | None = None
    first_frames: int = 1

    def pages(self, full: int) -> int:
        """Of ``full`` sealed pages, those that are kept."""
        return full if self.kept is None else min(full, self.kept)


def kept_pages(layer: LayerGeometry, geometry: ModelGeometry) -> int | None:
    """Sealed pages that the first token after them may see; ``None`` where no page ever leaves the window."""
    if layer.window is None or layer.window >= geometry.max_position:
        return None
    return -(-(layer.window - 1) // PAGE_TOKENS)


def kinds_of(geometry: ModelGeometry) -> dict[int | None, tuple[int, ...]]:
    """Layers by the pages that they keep: those that keep all first, then the shorter windows before the longer."""
    found: dict[int | None, list[int]] = {}
    for index, layer in enumerate(geometry.layers):
        found.setdefault(kept_pages(layer, geometry), []).append(index)
    return {kept: tuple(found[kept]) for kept in sorted(found, key=lambda k: -1 if k is None else k)}


def cut(
    kinds: dict[int | None, tuple[int, ...]],
    sizes: Sequence[int],
    least: int,
    cost: Callable[[int, tuple[LayerGroup, ...]], float],
) -> tuple[int, tuple[LayerGroup, ...]]:
    """Bytes of a frame, at least ``least``, and the groups for it, by the smallest ``cost``.

    ``sizes``: bytes of each layer's sealed page.
    """
    frames = {least}
    for layers in kinds.values():
        for count in range(1, len(layers) + 1):
            parts = -(-len(layers) // count)
            runs = (layers[i : i + parts] for i in range(0, len(layers), parts))
            frames.add(max(least, *(sum(sizes[i] for i in run) for run in runs)))
    found = {}
    for frame in frames:
        groups = tuple(LayerGroup(run, kept) for kept, layers in kinds.items() for run in _fill(layers, sizes, frame))
        found[frame] = cost(frame, groups), groups
    best = min(price for price, _ in found.values())
    frame = max(f for f, (price, _) in found.items() if price <= best * (1 + _PADDING))
    return frame, found[frame][1]


def _fill(layers: Iterable[int], sizes: Sequence[int], frame: int) -> list[tuple[int, ...]]:
    """``layers`` in order, as many in each frame as it holds."""
    runs: list[list[int]] = []
    room = -1
    for index in layers:
        if sizes[index] > room:
            runs.append([])
            room = frame
        runs[-1].append(index)
        room -= sizes[index]
    return [tuple(run) for run in runs]
