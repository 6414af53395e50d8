"""Attention on pages against a dense softmax written here, and the invariant that chunks do not show."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.driver import Frames
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbits.codecs import SCHEMES
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages
from kvbits.kernels.reference import ReferenceBackend, read_page

LENGTH = 200
SHAPES = {
    "mha": LayerGeometry(2, 2, 32, 32, 0.2),
    "gqa": LayerGeometry(6, 2, 64, 64, 0.125),
    "mqa": LayerGeometry(4, 1, 96, 96, 0.1),
    "two sizes": LayerGeometry(2, 2, 96, 64, 0.1),
    "window": LayerGeometry(4, 2, 64, 64, 0.125, window=50),
    "window of a page": LayerGeometry(4, 2, 64, 64, 0.125, window=64),
    "window over pages": LayerGeometry(4, 2, 64, 64, 0.125, window=130),
    "softcap": LayerGeometry(4, 2, 64, 64, 0.5, softcap=3.0),
    "sinks": LayerGeometry(4, 2, 64, 64, 0.125, sinks=True),
    "chunks": LayerGeometry(4, 2, 64, 64, 0.125, window=50, chunked=True),
    "chunks of pages": LayerGeometry(4, 2, 64, 64, 0.125, window=128, chunked=True),
    "all": LayerGeometry(4, 2, 64, 64, 0.5, window=70, softcap=3.0, sinks=True),
}


def model_of(layer: LayerGeometry) -> ModelGeometry:
    """The layer twice: the second lies behind the first in its frames, and is the one that is tested."""
    return ModelGeometry("m", (layer, layer), 4096, 100)


def random_step(
    layer: LayerGeometry, length: int = LENGTH, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(length, layer.num_heads, layer.key_dim, generator=generator)
    key = torch.randn(length, layer.num_kv_heads, layer.key_dim, generator=generator)
    value = torch.randn(length, layer.num_kv_heads, layer.value_dim, generator=generator)
    sinks = torch.randn(layer.num_heads, generator=generator) if layer.sinks else None
    return query, key, value, sinks


def run(frames: Frames, backend: Backend, step: tuple, chunks: list[int], sequence: int = 0) -> Tensor:
    query, key, value, sinks = step
    outputs, at = [], 0
    for count in chunks:
        batch = BatchLayout.of([frames.slice(sequence, count)])
        rows = slice(at, at + count)
        outputs.append(backend.forward(frames.pool.layers[1], batch, query[rows], key[rows], value[rows], sinks))
        at += count
    return torch.cat(outputs)


def dense(layer: LayerGeometry, dtype: str, step: tuple) -> Tensor:
    """The definition, one query and head at a time: own page in bfloat16, earlier pages through the codec."""
    query, key, value, sinks = step
    scheme = SCHEMES[dtype]
    key, value = key.bfloat16().double(), value.bfloat16().double()
    coded_key, coded_value = key.clone(), value.clone()
    for page in range(len(query) // PAGE_TOKENS):
        at = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        for h in range(layer.num_kv_heads):
            for codec, side, rows, coded, dim in (
                (scheme.key, "key", key, coded_key, layer.key_dim),
                (scheme.value, "value", value, coded_value, layer.value_dim),
            ):
                coded[at, h] = codec.decode(codec.encode(rows[at, h].float(), side), dim, side).double()
    out = torch.zeros(len(query), layer.num_heads, layer.value_dim, dtype=torch.float64)
    for t in range(len(query)):
        own = t // PAGE_TOKENS * PAGE_TOKENS
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        if layer.chunked:
            first = next(start for start in range(t, -1, -1) if start % layer.window == 0)
        seen_keys = torch.cat([coded_key[:own], key[own : t + 1]])[first:]
        seen_values = torch.cat([coded_value[:own], value[own : t + 1]])[first:]
        for h in range(layer.num_heads):
            kv = h // (layer.num_heads // layer.num_kv_heads)
            scores = seen_keys[:, kv] @ query[t, h].double() * layer.scale
            if layer.softcap:
                scores = torch.tanh(scores / layer.softcap) * layer.softcap
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else math.exp(float(sinks[h])))
            out[t, h] = weights / total @ seen_values[:, kv]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_outputs_are_those_of_a_dense_softmax(shape: str, dtype: str) -> None:
    layer = SHAPES[shape]
    step = random_step(layer)
    got = run(Frames(model_of(layer), dtype), ReferenceBackend(), step, [LENGTH])
    # float32 against float64 over at most 200 terms
    torch.testing.assert_close(got.double(), dense(layer, dtype, step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", SCHEMES)
def test_every_scheme_reads_back_what_its_codec_says(dtype: str) -> None:
    layer = SHAPES["gqa"]
    step = random_step(layer)
    got = run(Frames(model_of(layer), dtype), ReferenceBackend(), step, [150, 50])
    torch.testing.assert_close(got.double(), dense(layer, dtype, step), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=8, unique=True),
    shape=st.sampled_from(["gqa", "all"]),
    dtype=st.sampled_from(["bf16", "int8", "int4"]),
)
def test_chunks_leave_no_trace(cuts: list[int], shape: str, dtype: str) -> None:
    layer = SHAPES[shape]
    step = random_step(layer)
    edges = [0, *sorted(cuts), LENGTH]
    chunks = [b - a for a, b in itertools.pairwise(edges)]
    whole, cut = Frames(model_of(layer), dtype), Frames(model_of(layer), dtype, seed=7)
    expected = run(whole, ReferenceBackend(), step, [LENGTH])
    got = run(cut, ReferenceBackend(), step, chunks)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.page_bytes(0), cut.page_bytes(0))
    if LENGTH % PAGE_TOKENS:
        assert torch.equal(open_rows(whole, layer), open_rows(cut, layer))


def open_rows(frames: Frames, layer: LayerGeometry) -> Tensor:
    """Keys and values of the tokens in the open page."""
    view = frames.pool.layers[1]
    frame = frames.slice(0, 0).head[view.open.frame]
    rest = LENGTH % PAGE_TOKENS
    return torch.cat([part[:rest].flatten() for part in read_page(view, view.open, frame)])


def test_sequences_of_one_step_do_not_see_each_other() -> None:
    layer = SHAPES["all"]
    lengths = {0: 130, 1: 7, 2: 64, 3: 200}
    steps = {s: random_step(layer, n, seed=s) for s, n in lengths.items()}
    sinks = steps[0][3]
    frames = Frames(model_of(layer), "int4")
    batch = BatchLayout.of([frames.slice(s, n) for s, n in lengths.items()])
    query, key, value = (torch.cat([steps[s][i] for s in lengths]) for i in range(3))
    packed = ReferenceBackend().forward(frames.pool.layers[1], batch, query, key, value, sinks)
    for (s, n), got in zip(lengths.items(), packed.split(list(lengths.values())), strict=True):
        alone = run(Frames(model_of(layer), "int4"), ReferenceBackend(), (*steps[s][:3], sinks), [n])
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-6)


def test_a_tentative_step_keeps_its_first_page_in_16_bit() -> None:
    layer = SHAPES["gqa"]
    query, key, value, _ = random_step(layer, 80)
    frames = Frames(model_of(layer), "int4")
    backend, view = ReferenceBackend(), frames.pool.layers[1]
    first = frames.slice(0, 60)
    backend.forward(view, BatchLayout.of([first]), query[:60], key[:60], value[:60], None)
    other = frames.slice(1, 0)  # frames for the tail
    sealed = frames.slice(0, 20).sealed
    step = SequencePages(60, 20, sealed, first.head, other.head)
    out = backend.forward(view, BatchLayout.of([step]), query[60:], key[60:], value[60:], None)
    head_keys, head_values = read_page(view, view.open, first.head[view.open.frame])
    assert torch.equal(head_keys, key[:PAGE_TOKENS].bfloat16().float())
    assert torch.equal(head_values, value[:PAGE_TOKENS].bfloat16().float())
    expected = dense(layer, "int4", (query, key, value, None))[60:]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    # and the tail holds what the next step needs
    more = random_step(layer, 5, seed=3)
    again = SequencePages(80, 5, sealed, other.head, other.head)
    out = backend.forward(view, BatchLayout.of([again]), *more[:3], None)
    joined = tuple(torch.cat([a, b]) for a, b in zip((query, key, value), more[:3], strict=True))
    torch.testing.assert_close(out.double(), dense(layer, "int4", (*joined, None))[80:], rtol=1e-4, atol=1e-5)


def test_pages_that_the_window_left_are_not_read() -> None:
    layer = SHAPES["window"]
    step = random_step(layer)
    frames = Frames(model_of(layer), "int8")
    run(frames, ReferenceBackend(), tuple(None if x is None else x[:190] for x in step), [190])
    frames.pool.buffer[frames.sealed[0][0]] = 0xFF
    got = run(frames, ReferenceBackend(), tuple(None if x is None else x[190:] for x in step), [10])
    torch.testing.assert_close(got.double(), dense(layer, "int8", step)[190:], rtol=1e-4, atol=1e-5)


def test_bfloat16_rows_give_bfloat16_outputs() -> None:
    layer = SHAPES["gqa"]
    query, key, value, _ = random_step(layer)
    rounded = (query.bfloat16(), key.bfloat16(), value.bfloat16(), None)
    got = run(Frames(model_of(layer), "int8"), ReferenceBackend(), rounded, [LENGTH])
    assert got.dtype == torch.bfloat16
    expected = dense(layer, "int8", (rounded[0].float(), key, value, None))
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5)
