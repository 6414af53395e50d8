"""The CUDA kernels' own source, compiled for the CPU: lanes are coroutines."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Container
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.kernels.cuda import SOURCES
from kvbits.kernels.cuda.attend import Step, attend
from kvbits.kernels.cuda.tables import tables_of
from kvbits.kernels.cuda.variant import Variant
from kvbits.kernels.cuda.work import decoding
from kvbits.kernels.reference import ReferenceBackend
from kvbits.kernels.triton.tables import step_tables
from kvbits.pool import LayerView

COMPILER = shutil.which("g++") or shutil.which("clang++")
EMULATION = Path(__file__).parents[1] / "emulation"


class Emulation:
    """Launches that run here. ``change``: (file, text, other text) that is put into a copy of the source first."""

    def __init__(self, folder: Path, change: tuple[str, str, str] | None = None) -> None:
        self._folder, self._change = folder, change
        self._known: dict[Variant, ctypes.CDLL] = {}
        self.pool: Tensor = torch.empty(0)
        self.launched: list[Variant] = []
        self.faults = 0
        """Accesses that a GPU would not have made: unaligned, or outside of the pool or of shared memory."""

    def __call__(self, variant: Variant, grid: tuple[int, int], step: Step) -> None:
        self.launched.append(variant)
        run = self._library(variant).emulate
        pool = ctypes.c_void_p(self.pool.data_ptr()), ctypes.c_int64(self.pool.nbytes)
        self.faults += run(ctypes.byref(step), *grid, variant.shared_bytes, *pool)

    def prepare(self, variant: Variant) -> None:
        self._library(variant)

    def _library(self, variant: Variant) -> ctypes.CDLL:
        if variant not in self._known:
            key = hashlib.sha256(repr((variant, self._change)).encode()).hexdigest()[:16]
            sources, library = self._folder / f"{key}", self._folder / f"{key}.so"
            if not library.exists():
                shutil.copytree(SOURCES, sources)
                self._compile(variant, sources, library)
            self._known[variant] = ctypes.CDLL(str(library))
        return self._known[variant]

    def _compile(self, variant: Variant, sources: Path, library: Path) -> None:
        assert COMPILER is not None
        if self._change is not None:
            name, text, other = self._change
            source = (sources / name).read_text()
            assert text in source, (name, text)
            (sources / name).write_text(source.replace(text, other, 1))
        defines = [f"-D{define}" for define in variant.defines]
        command = [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            f"-I{EMULATION}",
            f"-I{sources}",
            *defines,
        ]
        subprocess.run([*command, "-x", "c++", EMULATION / "run.cpp", "-o", library], check=True)


class EmulatedBackend(Backend):
    """The reference, but for the rows of decoding sequences, which the emulated kernels write."""

    name = "emulated"

    def __init__(self, emulation: Emulation, blocks: int = 24, steps: Container[int] = range(10**6)) -> None:
        """Of ``steps``, counted from 0; ``blocks``: how many a machine runs at once."""
        self._emulation, self._blocks, self._steps = emulation, blocks, steps
        self._step = -1

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return None

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        before = view.buffer[torch.from_numpy(batch.head.ravel()).long()].clone()
        out = ReferenceBackend().forward(view, batch, query, key, value, sinks)
        self._step += 1
        if self._step not in self._steps or not len(decoding(batch, view.geometry.group_size)):
            return out
        pool = view.buffer.clone()  # what the step has sealed, and the open pages before it
        pool[torch.from_numpy(batch.head.ravel()).long()] = before
        self._emulation.pool = pool
        other = LayerView(view.index, view.geometry, pool, view.sealed, view.open, view.first_page, view.rounding)
        steps = step_tables(batch, view.first_page is not None, view.buffer.device)
        tables = tables_of(batch, other, self._blocks, steps)
        arrived = torch.zeros(len(tables.work.tiles) * view.geometry.num_kv_heads, dtype=torch.int32)
        rows = query.bfloat16(), key.bfloat16(), value.bfloat16()
        result = torch.full(out.shape, torch.nan, dtype=torch.bfloat16)
        attend(self._emulation, other, tables, rows, sinks, arrived, result)
        assert not arrived.any()
        for s in decoding(batch, view.geometry.group_size):
            own = slice(int(batch.rows[s]), int(batch.rows[s + 1]))
            out[own] = result[own].to(out.dtype)
        return out


def error_of(got: Tensor, expected: Tensor) -> float:
    """Root of the mean squared difference, relative to ``expected``'s; infinite where a number is none."""
    if not np.isfinite(got.numpy()).all():
        return float("inf")
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
