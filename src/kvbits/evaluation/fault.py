"""A planted fault: kernels whose sealed pages read back 5 % too large, to see that the laboratory notices."""

from __future__ import annotations

from torch import Tensor

from kvbits.codecs import OPEN
from kvbits.config import PAGE_TOKENS
from kvbits.kernels import BatchLayout
from kvbits.kernels.base import Watcher
from kvbits.kernels.reference import read_page, write_page
from kvbits.pool import LayerView

FACTOR = 1.05


class Faulty(Watcher):
    """Another backend with every page's scale off by :data:`FACTOR` as soon as it is sealed; 16-bit pages are not.

    Steps of at most one page (``max_num_batched_tokens=64``) see the fault in every sealed page; in longer ones the
    pages that a step seals are still right for the step itself.
    """

    name = "faulty"

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        output = self._backend.forward(view, batch, query, key, value, sinks)
        for start, count, frames in zip(batch.starts, batch.counts, batch.frames_of(view), strict=True):
            first, end = int(start) // PAGE_TOKENS, int(start + count) // PAGE_TOKENS
            for frame in frames[max(first, 1 if view.first_page else 0) : end]:
                _spoil(view, int(frame))
        return output


def _spoil(view: LayerView, frame: int) -> None:
    place = view.sealed
    if place.scheme == OPEN:
        return
    keys, values = read_page(view, place, frame)
    write_page(view, place, frame, FACTOR * keys, FACTOR * values)
