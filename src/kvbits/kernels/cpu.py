"""The C++ backend: fused append, seal and attention on the packed codes (``csrc/``)."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from kvbits.codecs import LayerRounding, Place, Scheme
from kvbits.config import LayerGeometry, align
from kvbits.errors import ConfigError
from kvbits.kernels import _native
from kvbits.kernels.base import Backend, BatchLayout
from kvbits.kernels.reference import ReferenceBackend
from kvbits.pool import LayerView

log = logging.getLogger(__name__)


class CpuBackend(Backend):
    """Kernels for x86-64 (AMX, AVX-512 VNNI, AVX2) and portable C++, chosen at run time.

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
        self._layers: dict[int, tuple[LayerView, _native.Layer | None]] = {}
        self._reference = ReferenceBackend()

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
        key, value = scheme.key.native_id, scheme.value.native_id
        reason = scheme.supports(layer)
        if reason or key is None or value is None:
            return reason
        if layer.latent and not self.native.opens_latents(key):
            return f"there are no kernels for latents coded as '{scheme.key.name}'"
        return self.native.supports(key, value)

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
        """As every backend's; the result is written to ``out``, contiguous and in the query's dtype, where given."""
        layer = view.geometry
        rows = batch.num_rows
        native = self.layer(view)
        if native is None:
            found = self._reference.forward(view, batch, query, key, value, sinks)
            return found if out is None else out.copy_(found)
        query, key, value = _rows(query), _rows(key), _rows(value)
        assert query.shape == (rows, layer.num_heads, layer.key_dim), (query.shape, rows, layer)
        assert key.shape == (rows, layer.num_kv_heads, layer.key_dim), (key.shape, rows, layer)
        assert value.shape == (rows, layer.num_kv_heads, layer.value_dim), (value.shape, rows, layer)
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in (torch.bfloat16, torch.float32), query.dtype
        shape = (rows, layer.num_heads, layer.value_dim)
        if out is None:
            out = torch.empty(shape, dtype=query.dtype)
        assert out.shape == shape, (out.shape, shape)
        assert out.dtype == query.dtype, (out.dtype, query.dtype)
        assert out.is_contiguous(), out.stride()
        self.native.forward(
            native,
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
            batch.again,
        )
        return out

    def layer(self, view: LayerView) -> _native.Layer | None:
        """What the kernels know of a layer of the pool; ``None`` where a codec has none and the reference runs."""
        known = self._layers.get(view.index)
        if known is None or known[0] is not view:
            known = self._layers[view.index] = (view, self._native_layer(view))
        return known[1]

    def _native_layer(self, view: LayerView) -> _native.Layer | None:
        layer, rounding = view.geometry, view.rounding or LayerRounding()
        for place in (view.sealed, view.first_page):
            if place is not None and not _has_kernels(place.scheme):
                log.warning(
                    "layer %d runs in torch, which is slow: '%s' has no native kernels", view.index, place.scheme.name
                )
                return None
        return _native.Layer(
            layer.num_heads,
            layer.num_kv_heads,
            layer.key_dim,
            layer.value_dim,
            layer.scale,
            layer.softcap or 0.0,
            -(layer.window or 0) if layer.chunked else layer.window or 0,
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
            layer.latent,
        )

    def tables(self, batch: BatchLayout) -> _native.Batch:
        """What the kernels know of a step."""
        known: _native.Batch | None = batch.shared.get((_native.Batch, batch.draft))
        if known is None:
            known = _native.Batch(
                batch.starts,
                batch.counts,
                batch.rows,
                batch.sealed,
                batch.head,
                batch.tail,
                batch.sink,
                batch.draft,
            )
            batch.shared[_native.Batch, batch.draft] = known
        return known


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


def _has_kernels(scheme: Scheme) -> bool:
    return scheme.key.native_id is not None and scheme.value.native_id is not None


def _place(place: Place, layer: LayerGeometry) -> _native.Place:
    scheme = place.scheme
    key, value = scheme.key.native_id, scheme.value.native_id
    assert key is not None, scheme.key
    assert value is not None, scheme.value
    return _native.Place(
        key,
        value,
        place.frame,
        place.offset,
        scheme.head_bytes(layer),
        align(scheme.key.page_bytes(layer.key_dim)),
    )


def _gomp_parallel() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch runs on; 0 where it is of another kind.

    One that the process has preloaded is found by all libraries before torch's own copy.
    """
    preloaded = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if preloaded is not None:
        return ctypes.cast(preloaded, ctypes.c_void_p).value or 0
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0
