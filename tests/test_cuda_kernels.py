"""The CUDA kernels' index maps and arithmetic, emulated lane by lane on real pages, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.attention import Inputs, make_inputs, run
from helpers.emulated import COMPILER, EmulatedBackend, Emulation, error_of

from kvbits.config import LayerGeometry
from kvbits.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

LAYER = LayerGeometry(4, 1, 64, 64, 64**-0.5)


def rounded(inputs: Inputs) -> Inputs:
    """With rows that bfloat16 can hold, so that backends get the same ones."""
    return Inputs(*([x.bfloat16().float() for x in part] for part in (inputs.query, inputs.key, inputs.value)), inputs.sinks)


def error(
    folder: Path, layer: LayerGeometry, dtype: str, lengths: list[int], new: int = 1, change: tuple[str, str, str] | None = None
) -> float:
    """Of the last ``new`` tokens of each sequence, decoded by the kernels."""
    inputs = rounded(make_inputs(layer, lengths))
    chunk = min(lengths) - new
    emulation = Emulation(folder, change)
    expected, _ = run(ReferenceBackend(), layer, dtype, inputs, chunk)
    got, _ = run(EmulatedBackend(emulation), layer, dtype, inputs, chunk)
    assert emulation.launched
    last = slice(chunk, chunk + new)
    return max(error_of(a[last], b[last]) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int2", "nf4"])
def test_a_step(tmp_path: Path, dtype: str) -> None:
    e = error(tmp_path, LAYER, dtype, [331])
    print(dtype, e)
    assert e < 4e-3
