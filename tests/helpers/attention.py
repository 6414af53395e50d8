"""Rows that attention is tested with, and steps over them on any backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.driver import Frames
from kvbits.codecs import parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.reference import ReferenceBackend

PLAIN = LayerGeometry(6, 2, 64, 64, 64**-0.5)
SHAPES = {
    "mha-64": replace(PLAIN, num_heads=2),
    "mqa-80": LayerGeometry(8, 1, 80, 80, 80**-0.5),
    "gqa-5-96": LayerGeometry(5, 1, 96, 96, 0.11),
    "gqa-4-128": LayerGeometry(8, 2, 128, 128, 128**-0.5),
    "gqa-2-256": LayerGeometry(2, 1, 256, 256, 256**-0.5),
    "mla-192-128": LayerGeometry(2, 2, 192, 128, 192**-0.5),
    "latent-4-48": LayerGeometry(4, 1, 48, 32, 48**-0.5, latent=True),
    "latent-16-576": LayerGeometry(16, 1, 576, 512, 192**-0.5, latent=True),
    "softcap": replace(PLAIN, softcap=3.0),
    "sinks": replace(PLAIN, sinks=True),
    "window-1": replace(PLAIN, window=1),
    "window-63": replace(PLAIN, window=63),
    "window-64": replace(PLAIN, window=64),
    "window-130-softcap-sinks": replace(PLAIN, window=130, softcap=5.0, sinks=True),
}


@dataclass
class Inputs:
    """Rows of several sequences, and the numbers that attention has to produce from them."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    sinks: Tensor | None


def make_inputs(layer: LayerGeometry, lengths: list[int], seed: int = 0) -> Inputs:
    """Keys with a few loud channels and an offset, as models have them; queries that attend sharply and broadly."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.ones(layer.key_dim)
    loud[:: layer.key_dim // 4] = 5.0
    offset = torch.randn(layer.num_kv_heads, layer.key_dim, generator=g) * loud
    query, key, value = [], [], []
    for n in lengths:
        sharpness = torch.rand(n, layer.num_heads, 1, generator=g) * 2
        query.append(torch.randn(n, layer.num_heads, layer.key_dim, generator=g) * sharpness)
        key.append(torch.randn(n, layer.num_kv_heads, layer.key_dim, generator=g) * loud + offset)
        own = torch.randn(n, layer.num_kv_heads, layer.value_dim, generator=g)
        value.append(key[-1][..., : layer.value_dim] if layer.latent else own)
    sinks = torch.randn(layer.num_heads, generator=g) if layer.sinks else None
    return Inputs(query, key, value, sinks)


def run(
    backend: Backend,
    layer: LayerGeometry,
    dtype: str,
    inputs: Inputs,
    chunk: int = 1000,
    float_type: torch.dtype = torch.float32,
    alone: bool = False,
    draft: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and sealed pages of every sequence, ``chunk`` tokens a step, all sequences in one step or each alone."""
    geometry = ModelGeometry("test", (layer, layer), 8192, 16)
    need = sum(len(q) // 64 + 8 for q in inputs.query) * 2
    frames = Frames(geometry, dtype, need)
    view = frames.pool.layers[1]  # not the first: an offset of 0 would hide that it is ignored
    done = [0] * len(inputs.query)
    outputs: list[list[Tensor]] = [[] for _ in inputs.query]
    while True:
        waiting = [s for s, q in enumerate(inputs.query) if done[s] < len(q)]
        if not waiting:
            break
        waiting = waiting[:1] if alone else waiting
        counts = [min(chunk, len(inputs.query[s]) - done[s]) for s in waiting]
        batch = BatchLayout.of([frames.slice(s, n) for s, n in zip(waiting, counts, strict=True)], draft)

        def rows(parts: list[Tensor], waiting: list[int] = waiting, counts: list[int] = counts) -> Tensor:
            pieces = [parts[s][done[s] : done[s] + n] for s, n in zip(waiting, counts, strict=True)]
            return torch.cat(pieces).to(float_type)

        out = backend.forward(view, batch, rows(inputs.query), rows(inputs.key), rows(inputs.value), inputs.sinks)
        for s, n, part in zip(waiting, counts, out.split(counts), strict=True):
            outputs[s].append(part)
            done[s] += n
    place = view.sealed
    size = place.scheme.layer_bytes(layer)
    pages = [frames.page_bytes(s)[:, place.offset : place.offset + size] for s in range(len(done))]
    return [torch.cat(parts) for parts in outputs], pages


def assert_agrees(layer: LayerGeometry, dtype: str, isa: str, lengths: list[int], draft: bool = False) -> None:
    """Page bytes equal; outputs within what the kernel's arithmetic explains.

    16-bit pages: products are exact and summed in float32, so 2e-5 covers the order of summation. Integer pages: the
    query and the softmax weights are rounded to 8 bits (codes of up to 4 bits) or about 15 bits (finer codes). Against
    the rounding of the codes themselves that is small: its energy stays below 1/16 of what the codec adds to the exact
    result, and no single element is off by more than the codec's largest error.
    """
    inputs = make_inputs(layer, lengths)
    expected, expected_pages = run(ReferenceBackend(), layer, dtype, inputs, draft=draft)
    exact, _ = run(ReferenceBackend(), layer, "bf16", inputs)
    got, pages = run(CpuBackend(isa), layer, dtype, inputs, draft=draft)
    for a, b in zip(pages, expected_pages, strict=True):
        assert torch.equal(a, b)
    error = torch.cat(got) - torch.cat(expected)
    assert torch.isfinite(error).all()
    codec = torch.cat(expected) - torch.cat(exact)
    assert error.square().mean().sqrt() <= 0.25 * codec.square().mean().sqrt() + 2e-6
    # Values are of about 1, but latents, which are keys too, have loud channels.
    size = max(1.0, float(torch.cat(expected).abs().max()) / 4) if layer.latent else 1.0
    assert error.abs().max() <= codec.abs().max() + 2e-5 * size


def check_read_again(backend: Backend, counts: tuple[int, ...] = (60, 10, 1, 150, 57, 1, 1, 20)) -> None:
    """Layers that share keys and values bring them one after another: each reads what the first alone would have read,
    and the pool is that of one call."""
    inputs = make_inputs(PLAIN, [300])
    parts = [x[0] for x in (inputs.query, inputs.key, inputs.value)]
    other = parts[0].flip(0)

    def steps(queries: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Over a page's end, over several, within one; the outputs of the last of ``queries``, and the pool."""
        frames = Frames(ModelGeometry("test", (PLAIN, PLAIN), 8192, 16), "int4", 40)
        view, at, outputs = frames.pool.layers[1], 0, []
        view.buffer.zero_()
        for count in counts:
            batch, rows = BatchLayout.of([frames.slice(0, count)]), slice(at, at + count)
            for number, query in enumerate(queries):
                own = replace(batch, again=number + 1 < len(queries))
                out = backend.forward(view, own, query[rows], parts[1][rows], parts[2][rows], None)
            outputs.append(out.clone())
            at += count
        return outputs, view.buffer.clone()

    alone, pool = steps([other])
    shared, same = steps([parts[0], parts[0], other])
    assert torch.equal(torch.cat(shared), torch.cat(alone))
    assert torch.equal(same, pool)


def check_tentative_step(backend: type[Backend]) -> None:
    """A step over a page boundary with a second open page: the first keeps its rows, the second gets the rest."""
    inputs = make_inputs(PLAIN, [70])
    geometry = ModelGeometry("test", (PLAIN, PLAIN), 8192, 16)
    parts = [x[0] for x in (inputs.query, inputs.key, inputs.value)]

    def states(tentative: bool) -> tuple[Tensor, Tensor, Tensor]:
        frames = Frames(geometry, "int4", 32)
        view, engine = frames.pool.layers[1], backend()
        engine.forward(view, BatchLayout.of([frames.slice(0, 60)]), *(x[:60] for x in parts), None)
        step = frames.slice(0, 10)
        spare = [frames._free.pop() for _ in step.head]
        if tentative:
            step = replace(step, tail=spare)
        before = frames.open_bytes(0)
        out = engine.forward(view, BatchLayout.of([step]), *(x[60:] for x in parts), None)
        size = view.open.scheme.layer_bytes(PLAIN)
        place = view.open
        tail = frames.pool.buffer[step.tail[place.frame], place.offset : place.offset + size]
        if tentative:
            kept = frames.open_bytes(0)
            # Rows 0 to 59 are untouched; 60 to 63 were appended.
            codec = place.scheme.value
            first = place.scheme.key.page_bytes(64)
            old, new = (
                codec.decode(x[place.frame, place.offset + first : place.offset + first + 8192], 64, "value")
                for x in (before, kept)
            )
            assert torch.equal(old[:60], new[:60])
            assert torch.equal(new[60:64], parts[2][60:64, 0].bfloat16().float())
        return out, frames.page_bytes(0), tail

    plain, tentative = states(False), states(True)
    assert torch.equal(plain[0], tentative[0])
    place_size = parse_policy("int4", 1).layers[0].layer_bytes(PLAIN)
    assert torch.equal(plain[1][:, place_size : 2 * place_size], tentative[1][:, place_size : 2 * place_size])
    rows = [parse_policy("bf16", 1).layers[0].key.decode(x[:8192], 64, "key")[:6] for x in (plain[2], tentative[2])]
    assert torch.equal(rows[0], rows[1])
