"""Prompts by FlashAttention: its pieces in torch against a plain softmax, its kernel against the codecs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention import PLAIN, SHAPES, make_inputs
from helpers.driver import Frames
from torch import Tensor

from kvbits.codecs import SCHEMES
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import BatchLayout
from kvbits.kernels.reference import ReferenceBackend, read_page
from kvbits.pool import LayerView

pytest.importorskip("triton", reason="Triton exists for Linux only")
from kvbits.kernels.triton import flash
from kvbits.kernels.triton.format import block_of, shape_of
from kvbits.kernels.triton.launch import LayerKernels, run, unpack
from kvbits.kernels.triton.tables import step_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = LayerGeometry(3, 1, 64, 64, 64**-0.5)
PLAIN_POINTERS = (None, None, None, None)


class Decoded:
    """Stands for the kernel that decodes pages: by the codecs. Counts how often each page was decoded."""

    def __init__(self, view: LayerView, batch: BatchLayout) -> None:
        self._view, self._batch = view, batch
        self.pages: list[tuple[int, int]] = []
        self.most = 0

    def __call__(self, kernel: Any, grid: Any, args: tuple[Any, ...], constants: dict[str, Any], **_: Any) -> None:
        assert kernel.fn.__name__ == "unpack_pages"
        keys, values, sequence, low, tokens = args[3:]
        assert keys.shape[1] == tokens == 64 * grid[0]
        self.most = max(self.most, keys.nbytes + values.nbytes)
        for i in range(grid[0]):
            self.pages.append((sequence, low + i))
            page = read_page(self._view, self._view.sealed, int(self._batch.sealed[sequence, low + i]))
            for target, x in zip((keys, values), page, strict=True):
                target[:, 64 * i : 64 * (i + 1)] = x.transpose(0, 1)


def kernels_of(view: LayerView) -> LayerKernels:
    layer = view.geometry
    sealed = block_of(view.sealed.scheme, layer)
    sink = None if view.first_page is None else block_of(view.first_page.scheme, layer)
    shape = shape_of(layer, sealed, *([] if sink is None else [sink]))
    return LayerKernels(view, shape, sealed, block_of(view.open.scheme, layer), sink, PLAIN_POINTERS, PLAIN_POINTERS)


def expected(view: LayerView, batch: BatchLayout, query: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log-sum-exps ``[rows, heads]`` over the sealed pages before each row's own."""
    layer = view.geometry
    mean = torch.zeros(len(query), layer.num_heads, layer.value_dim)
    lse = torch.full(mean.shape[:2], -torch.inf)
    for s, row in enumerate(batch.rows[:-1].tolist()):
        pages = [read_page(view, view.sealed, int(frame)) for frame in batch.sealed[s] if frame >= 0]
        for i in range(int(batch.counts[s])):
            before = pages[: (int(batch.starts[s]) + i) // 64]
            if before:
                keys, values = (torch.cat(x).repeat_interleave(layer.group_size, 1) for x in zip(*before, strict=True))
                scores = torch.einsum("hd,thd->ht", query[row + i].float(), keys) * layer.scale
                mean[row + i] = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
                lse[row + i] = scores.logsumexp(-1)
    return mean, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scratch", [1, 128 << 20])
def test_chunks_of_all_lengths(monkeypatch: pytest.MonkeyPatch, scratch: int, dtype: torch.dtype) -> None:
    """Starts in and at the edges of pages, 1 to 8 pages of a chunk, whole contexts in one piece or page by page."""
    monkeypatch.setattr(flash, "SCRATCH_BYTES", scratch)
    chunks = [(0, 64), (0, 65), (30, 100), (64, 192), (200, 130), (150, 449), (128, 512)]
    layer = PLAIN
    frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), "int8", 100)
    view = frames.pool.layers[1]
    inputs = make_inputs(layer, [start + count for start, count in chunks])
    rows = (inputs.query, inputs.key, inputs.value)
    first = [s for s, (start, _) in enumerate(chunks) if start]
    head = BatchLayout.of([frames.slice(s, chunks[s][0]) for s in first])
    ReferenceBackend().forward(view, head, *(torch.cat([x[s][: chunks[s][0]] for s in first]) for x in rows), None)
    batch = BatchLayout.of([frames.slice(s, count) for s, (_, count) in enumerate(chunks)])
    parts = [torch.cat([x[start:] for x, (start, _) in zip(part, chunks, strict=True)]) for part in rows]
    ReferenceBackend().forward(view, batch, *parts, None)
    query, decoded = parts[0].to(dtype), Decoded(view, batch)
    kernels, tables = kernels_of(view), step_tables(batch, False, torch.device("cpu"))
    found = flash.before_own_page(decoded, kernels, tables, batch, list(range(len(chunks))), query)
    mean, lse = expected(view, batch, query)
    # bfloat16: keys, values and each piece's mean are rounded to 8 bits
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.mean, mean, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.lse, lse, atol=tolerance, rtol=tolerance)
    seen = [(s, p) for s, (start, count) in enumerate(chunks) for p in range((start + count - 1) // 64)]
    assert sorted(decoded.pages) == seen  # once each
    page = 64 * layer.num_kv_heads * 2 * layer.key_dim * query.element_size()
    assert decoded.most <= max(scratch, 7 * page)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [*SCHEMES, "nf4+sink:int8", "int4+sink:mix8_4"])
def test_the_kernel_decodes_every_dtype(dtype: str) -> None:
    layer = SMALL
    frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), dtype, 16)
    view, inputs = frames.pool.layers[1], make_inputs(layer, [130])
    rows = [x[0] for x in (inputs.query, inputs.key, inputs.value)]
    batch = BatchLayout.of([frames.slice(0, 130)])
    ReferenceBackend().forward(view, batch, *rows, None)
    on_device = replace(view, buffer=view.buffer.to(DEVICE))
    tables = step_tables(batch, view.first_page is not None, torch.device(DEVICE))
    keys, values = (torch.full((1, 128, 64), torch.nan, device=DEVICE) for _ in range(2))
    unpack(run, kernels_of(on_device), tables, 0, 0, keys, values)
    places = [(view.sealed, int(frame)) for frame in batch.sealed[0]]
    if view.first_page is not None:
        places[0] = view.first_page, int(batch.sink[0, view.first_page.frame])
    for page, (place, frame) in enumerate(places):
        for got, x in zip((keys, values), read_page(view, place, frame), strict=True):
            part = got[0, 64 * page : 64 * (page + 1)].cpu()
            torch.testing.assert_close(part, x[:, 0], atol=1e-5, rtol=1e-5)


def test_what_stays_with_triton_is_named() -> None:
    layers = [SMALL, replace(SMALL, window=100), replace(SMALL, softcap=3.0), replace(SMALL, sinks=True)]
    assert flash.line(layers, torch.device("cpu")) == (
        "FlashAttention for 2 layers, Triton's kernels for 1 (windows), Triton's kernels for 1 (soft caps)"
    )
    assert flash.line(layers[:1], torch.device("xpu")) == "Triton's kernels for 1 (no FlashAttention on 'xpu')"
    assert flash.refusal(SHAPES["mla-192-128"], torch.device("cpu"), torch.bfloat16) == "head sizes 192 and 128"
