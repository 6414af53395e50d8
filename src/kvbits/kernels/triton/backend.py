"""The Triton backend: seal, attend, append, in this order, so that the open page is read before it is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from triton import knobs

from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.errors import ConfigError
from kvbits.kernels import GPUS, Backend, BatchLayout
from kvbits.kernels.triton.folded import in_parts
from kvbits.kernels.triton.format import block_of, refusal, shape_of
from kvbits.kernels.triton.launch import (
    Launch,
    LayerKernels,
    Sides,
    append,
    attend_pages,
    decode,
    prefill,
    rounding_of,
    run,
    seal,
)
from kvbits.kernels.triton.pieces import pieces_of, shared_memory, tiling_of
from kvbits.kernels.triton.tables import StepTables, Tiles, decode_tiles, prompt_tiles, step_tables
from kvbits.pool import LayerView

MakeTiles = Callable[[BatchLayout, int, torch.device], Tiles]


class TritonBackend(Backend):
    """Kernels for NVIDIA, AMD and Intel GPUs; on the CPU in Triton's interpreter only, which is for tests.

    Pages are byte for byte those of the other backends. Numbers: float32 rows are multiplied in float32, bfloat16 rows
    with keys (or queries times their scales), values and softmax weights rounded to bfloat16, both added in float32.
    Raises ``ConfigError`` for a ``device`` that Triton has no kernels for.
    """

    name = "triton"
    layer_groups = False
    batch_invariant = False  # splits of decode steps are merged, prefill goes straight through

    def __init__(self, device: torch.device | str, launch: Launch = run) -> None:
        self.device = torch.device(device)
        self._launch = launch
        if self.device.type not in GPUS and not knobs.runtime.interpret:
            raise ConfigError(
                f"the backend 'triton' needs a GPU; the device is '{self.device}'. Choose the backend 'cpu', or a "
                "device such as 'cuda'"
            )
        self.graphs = self.device.type == "cuda"
        self._shared = shared_memory(self.device)
        self._layers: dict[tuple[int, bool], LayerKernels] = {}

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return refusal(scheme, layer)

    def forward(
        self,
        view: LayerView,
        batch: BatchLayout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As every backend's; the result is written to ``out``, in the query's dtype, where given."""
        layer, rows = view.geometry, batch.num_rows
        assert query.shape == (rows, layer.num_heads, layer.key_dim), (query.shape, rows, layer)
        assert key.shape == (rows, layer.num_kv_heads, layer.key_dim), (key.shape, rows, layer)
        assert value.shape == (rows, layer.num_kv_heads, layer.value_dim), (value.shape, rows, layer)
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in (torch.bfloat16, torch.float32), query.dtype
        assert query.device == view.buffer.device, (query.device, view.buffer.device)
        if query.dtype != torch.bfloat16:
            key, value = key.to(torch.bfloat16), value.to(torch.bfloat16)
        sides = Sides(_rows(query), _rows(key), _rows(value))
        kernels = self._kernels(view, batch.draft)
        tables = self._tables(view, batch)
        shape = (rows, layer.num_heads, layer.value_dim)
        out = query.new_empty(shape) if out is None else out
        assert out.shape == shape, (out.shape, shape)
        assert out.dtype == query.dtype, (out.dtype, query.dtype)
        assert out.stride(-1) == 1, out.stride()
        if batch.completes:
            seal(self._launch, kernels, tables, sides)
        stored = self._attend_few(view, batch, kernels, tables, sides, sinks, out)
        self._attend_many(view, batch, kernels, tables, sides, sinks, out)
        if not stored and not batch.again:
            append(self._launch, kernels, tables, sides)
        return out

    def _attend_few(
        self, view: LayerView, batch: BatchLayout, kernels: LayerKernels, tables: StepTables, sides: Sides,
        sinks: Tensor | None, out: Tensor,
    ) -> bool:  # fmt: skip
        """Attention of sequences with few new tokens; whether it has stored the step's rows too."""
        tiles = self._tiles(view, batch, decode_tiles)
        decode(self._launch, kernels, tables, tiles, sides, sinks, out)
        return False

    def _attend_many(
        self, view: LayerView, batch: BatchLayout, kernels: LayerKernels, tables: StepTables, sides: Sides,
        sinks: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """Attention of prompts, of which there are none in a static layout."""
        if batch.static:
            return
        if sides.query.dtype == torch.float32:
            tiles = self._tiles(view, batch, prompt_tiles)
            prefill(self._launch, kernels, tables, tiles, sides, sinks, out)
            return
        tiling = kernels.tiling
        pieces, cut = pieces_of(batch, view.geometry, tiling.rows, out.device)
        if pieces:
            attend_pages(self._launch, kernels, tables, pieces, cut, tiling, sides, sinks, out)

    def _kernels(self, view: LayerView, draft: bool) -> LayerKernels:
        known = self._layers.get((view.index, draft))
        if known is None or known.view is not view:
            layer = view.geometry
            sealed = block_of(view.sealed.scheme, layer, draft)
            sink = None if view.first_page is None else block_of(view.first_page.scheme, layer, draft)
            shape = shape_of(layer, sealed, *([] if sink is None else [sink]))
            opened = block_of(view.open.scheme, layer)
            rounding = rounding_of(view.rounding, view.buffer.device)
            tiling = tiling_of(layer, self._shared)
            known = LayerKernels(view, shape, sealed, opened, sink, *rounding, bool(in_parts(sealed)), tiling)
            self._layers[view.index, draft] = known
        return known

    def _tables(self, view: LayerView, batch: BatchLayout) -> StepTables:
        """The step's tables, made once for all layers that can share them."""
        key = StepTables, view.first_page is not None
        if key not in batch.shared:
            batch.shared[key] = step_tables(batch, key[1], view.buffer.device)
        found: StepTables = batch.shared[key]
        return found

    def _tiles(self, view: LayerView, batch: BatchLayout, make: MakeTiles) -> Tiles:
        """Likewise what ``make`` makes, for kernels that need it."""
        key = make, view.geometry.group_size
        if key not in batch.shared:
            batch.shared[key] = make(batch, key[1], view.buffer.device)
        found: Tiles = batch.shared[key]
        return found


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
