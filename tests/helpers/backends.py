"""The backends that the tests of attention run on."""

from __future__ import annotations

from collections.abc import Callable

from kvbits.kernels import Backend
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.reference import ReferenceBackend

BACKENDS: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend, "cpu": CpuBackend}
"""Name -> factory: one line a backend."""
