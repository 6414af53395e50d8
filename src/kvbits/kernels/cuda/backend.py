"""The CUDA backend: decode by these kernels, everything else by Triton's."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cuda.attend import Launch, Tables, attend
from kvbits.kernels.cuda.driver import Driver, refusal
from kvbits.kernels.cuda.tables import tables_of
from kvbits.kernels.cuda.variant import MAX_ROWS, Variant, blocks_at_once, together, variant_of
from kvbits.kernels.cuda.work import decoding
from kvbits.kernels.triton.backend import TritonBackend
from kvbits.kernels.triton.launch import LayerKernels, Sides
from kvbits.kernels.triton.tables import StepTables
from kvbits.pool import LayerView

log = logging.getLogger(__name__)


class CudaBackend(TritonBackend):
    """Decode of bfloat16 rows by kernels in CUDA C++, for the layers that have some; the rest by Triton's kernels.

    ``only``: layers without are refused instead, and so are float32 rows. ``launch`` and ``multiprocessors`` stand for
    a device. Raises ``ConfigError`` for a device that the kernels cannot run on.
    """

    name = "cuda"

    def __init__(
        self, device: torch.device | str, only: bool = False, launch: Launch | None = None, multiprocessors: int = 0
    ) -> None:
        super().__init__(device)
        if launch is None:
            reason = refusal(self.device)
            if reason is not None:
                raise ConfigError(f"the backend 'cuda' cannot run on '{self.device}': {reason}")
            driver = Driver(self.device)
            launch, multiprocessors = driver, driver.multiprocessors
        self._only, self._run, self._multiprocessors = only, launch, multiprocessors
        self._arrived = torch.zeros(0, dtype=torch.int32)
        self._ready: dict[int, tuple[LayerView, bool]] = {}
        self._warned = False

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        reason = super().supports(scheme, layer)
        if reason is None and self._only:
            variant = variant_of(scheme, layer, layer.group_size)
            reason = f"there are no CUDA kernels for {variant}" if isinstance(variant, str) else None
        return reason

    def kernels(self, scheme: Scheme, layer: LayerGeometry) -> str:
        variant = variant_of(scheme, layer, layer.group_size)
        return f"triton (no CUDA kernels for {variant})" if isinstance(variant, str) else "cuda"

    def prepare(self, views: Sequence[LayerView]) -> None:
        """Compile what steps of one token of each sequence need, and those of several."""
        super().prepare(views)
        for view in views:
            layer = view.geometry
            for place in (view.sealed, view.first_page):
                for rows in (layer.group_size, MAX_ROWS):
                    variant = None if place is None else variant_of(place.scheme, layer, rows)
                    if isinstance(variant, Variant):
                        self._run.prepare(variant)

    def _attend_few(
        self, view: LayerView, batch: BatchLayout, kernels: LayerKernels, tables: StepTables, sides: Sides,
        sinks: Tensor | None, out: Tensor,
    ) -> bool:  # fmt: skip
        if not self._has_kernels(view, sides.query):
            return super()._attend_few(view, batch, kernels, tables, sides, sinks, out)
        found = self._tables_of(view, batch, tables)
        if not len(found.work.tiles):
            return False
        needed = len(found.work.tiles) * view.geometry.num_kv_heads
        arrived = self._counters(batch, needed, out.device)
        rows = _even(sides.query), _even(sides.key), _even(sides.value)
        stores = found.stores and not batch.again
        attend(self._run, view, found, rows, sinks, arrived, out, stores)
        return stores

    def _has_kernels(self, view: LayerView, query: Tensor) -> bool:
        known = self._ready.get(view.index)
        if known is None or known[0] is not view:
            places = [view.sealed] if view.first_page is None else [view.sealed, view.first_page]
            layer = view.geometry
            missing = any(isinstance(variant_of(place.scheme, layer, layer.group_size), str) for place in places)
            known = self._ready[view.index] = (view, not missing)
        if not known[1] or query.dtype == torch.bfloat16:
            return known[1]
        if self._only:
            raise UnsupportedError("the backend 'cuda' takes bfloat16 rows; load the model with dtype bfloat16")
        if not self._warned:
            log.warning("The rows are float32: Triton's kernels decode; the CUDA kernels take bfloat16")
            self._warned = True
        return False

    def _tables_of(self, view: LayerView, batch: BatchLayout, steps: StepTables) -> Tables:
        """The step's tables, made once for all layers that can share them."""
        layer, first, known = view.geometry, view.first_page, batch.shared
        frames = view.open.frame, None if first is None else first.frame, together(view.sealed.scheme, layer)
        key = (Tables, layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.window, frames)
        if key not in known:
            rows = layer.group_size * int(batch.counts[decoding(batch, layer.group_size)].max(initial=1))
            blocks = self._multiprocessors * blocks_at_once(layer.key_dim, rows)
            known[key] = tables_of(batch, view, blocks, steps)
        found: Tables = known[key]
        return found

    def _counters(self, batch: BatchLayout, needed: int, device: torch.device) -> Tensor:
        """Zeros ``int32``, which are zeros again after the launch; a graph keeps its own."""
        if batch.static:
            if len(batch.shared.get("arrived", ())) < needed:
                batch.shared["arrived"] = torch.zeros(needed, dtype=torch.int32, device=device)
            own: Tensor = batch.shared["arrived"]
            return own
        if len(self._arrived) < needed:
            self._arrived = torch.zeros(2 * needed, dtype=torch.int32, device=device)
        return self._arrived


def _even(x: Tensor) -> Tensor:
    """``x`` with strides that keep pairs of elements in one word."""
    return x if x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0 and x.data_ptr() % 4 == 0 else x.contiguous()
