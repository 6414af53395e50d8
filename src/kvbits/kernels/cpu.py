"""The C++ backend: fused append, seal and attention on the packed codes (``csrc/``)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kvbits.codecs import LayerRounding, Place, Scheme
from kvbits.config import LayerGeometry, align
from kvbits.errors import ConfigError
from kvbits.kernels import _native
from kvbits.kernels.base import Backend, BatchLayout
from kvbits.pool import LayerView


class CpuBackend(Backend):
    """Kernels for x86-64 (AVX-512 VNNI, AVX2) and portable C++, chosen at run time.

    ``isa`` is ``"auto"`` or one of :func:`available_isas`; ``threads`` defaults to torch's number. One instance
    serves one engine: it keeps the scratch memory of a step, so calls from several threads take turns.
    """

    name = "cpu"

    def __init__(self, isa: str = "auto", threads: int | None = None) -> None:
        if isa != "auto" and isa not in available_isas():
            choices = ", ".join(available_isas())
            raise ConfigError(f"the instruction set '{isa}' does not run here; choose from {choices}")
        count = torch.get_num_threads() if threads is None else threads
        if count < 1:
            raise ConfigError(f"threads is {count}; it must be positive")
        self.native = _native.Cpu(isa, count, _gomp_parallel())
        self._layers: dict[int, tuple[LayerView, _native.Layer]] = {}
        self._batch: tuple[BatchLayout, _native.Batch] | None = None

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.native.isa)

    @property
    def threads(self) -> int:
        """Threads that a call uses."""
        return int(self.native.threads)

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        if max(layer.key_dim, layer.value_dim) > _native.MAX_DIM:
            return f"head size {max(layer.key_dim, layer.value_dim)} is over {_native.MAX_DIM}"
        reason = self.native.supports(scheme.key.native_id, scheme.value.native_id)
        return scheme.supports(layer) or (None if reason is None else str(reason))

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        layer = view.geometry
        rows = batch.num_rows
        query, key, value = _rows(query), _rows(key), _rows(value)
        assert query.shape == (rows, layer.num_heads, layer.key_dim), (query.shape, rows, layer)
        assert key.shape == (rows, layer.num_kv_heads, layer.key_dim), (key.shape, rows, layer)
        assert value.shape == (rows, layer.num_kv_heads, layer.value_dim), (value.shape, rows, layer)
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in (torch.bfloat16, torch.float32), query.dtype
        out = torch.empty(rows, layer.num_heads, layer.value_dim, dtype=query.dtype)
        self.native.forward(
            self.layer(view),
            self.tables(batch),
            query.dtype == torch.float32,
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            0 if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        return out

    def layer(self, view: LayerView) -> _native.Layer:
        """What the kernels know of a layer of the pool."""
        known = self._layers.get(view.index)
        if known is None or known[0] is not view:
            layer, rounding = view.geometry, view.rounding or LayerRounding()
            native = _native.Layer(
                layer.num_heads,
                layer.num_kv_heads,
                layer.key_dim,
                layer.value_dim,
                layer.scale,
                layer.softcap or 0.0,
                layer.window or 0,
                _place(view.sealed, layer),
                _place(view.open, layer),
                None if view.first_page is None else _place(view.first_page, layer),
                view.buffer.stride(0),
                view.buffer.data_ptr(),
                _table(rounding.key.feedback, layer.num_kv_heads, layer.key_dim, layer.key_dim),
                _table(rounding.value.feedback, layer.num_kv_heads, layer.value_dim, layer.value_dim),
                _table(rounding.key.clip, layer.num_kv_heads),
                _table(rounding.value.clip, layer.num_kv_heads),
                _table(rounding.key.order, layer.num_kv_heads, layer.key_dim, dtype=torch.int32),
                _table(rounding.value.order, layer.num_kv_heads, layer.value_dim, dtype=torch.int32),
            )
            known = self._layers[view.index] = (view, native)
        return known[1]

    def tables(self, batch: BatchLayout) -> _native.Batch:
        """What the kernels know of a step."""
        known = self._batch
        if known is None or known[0] is not batch:
            native = _native.Batch(
                batch.starts,
                batch.counts,
                batch.rows,
                batch.sealed,
                batch.head,
                batch.tail,
                batch.sink,
                batch.draft,
            )
            known = self._batch = (batch, native)
        return known[1]


def available_isas() -> list[str]:
    """Instruction sets whose kernels run on this processor, the best first."""
    return list(_native.available_isas())


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(table: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Address of a parameter table that the layer's view keeps alive; 0 for none."""
    if table is None:
        return 0
    assert table.shape == shape, (table.shape, shape)
    assert table.dtype == dtype, table.dtype
    assert table.is_contiguous(), table.stride()
    return table.data_ptr()


def _place(place: Place, layer: LayerGeometry) -> _native.Place:
    scheme = place.scheme
    return _native.Place(
        scheme.key.native_id,
        scheme.value.native_id,
        place.frame,
        place.offset,
        scheme.head_bytes(layer),
        align(scheme.key.page_bytes(layer.key_dim)),
    )


def _gomp_parallel() -> int:
    """Address of ``GOMP_parallel`` in torch's own OpenMP runtime; 0 where torch uses another one."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0
