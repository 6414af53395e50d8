"""What a product is compared with: a plain read of memory, and products in registers (``peak.c``)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bandwidth import make_buffer

_FLAGS = {
    "amx": ["-mavx512f", "-mamx-tile", "-mamx-bf16"],
    "avx512": ["-mavx512f", "-mavx512vnni"],
    "avx2": ["-mavx2"],
}
"""Compiler flags by instruction set; an emulated one has no peak."""
_READING = ["-march=native"]
_ROUNDS = 16_000_000


class Yardsticks:
    """Reads ``mib`` MiB and multiplies, on ``threads`` threads. Needs a C compiler (``CC`` or ``cc``).

    ``cpu_time``: on a busy machine, time by the processor's clock of this process.
    """

    def __init__(self, threads: int, mib: int = 256, cpu_time: bool = False) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise SystemExit("the yardsticks need a C compiler; set CC")
        self._threads = ThreadPoolExecutor(threads)
        self._count = threads
        self._cpu_time = cpu_time
        self._buffer = np.frombuffer(make_buffer(mib << 20, True), np.uint64)
        self._compiler = compiler
        self._libraries: dict[str, ctypes.CDLL] = {}

    def now(self) -> float:
        """Seconds; of processor time each thread's share, so that other processes count less."""
        return time.process_time() / self._count if self._cpu_time else time.perf_counter()

    def read(self) -> float:
        """Bytes a second, the best of three passes: threads may begin one on the same core."""
        parts = np.array_split(self._buffer, self._count)
        library = self._library("read", _READING)
        least = float("inf")
        for _ in range(3):
            begin = self.now()
            list(self._threads.map(lambda part: library.plain_read(part.ctypes.data, len(part)), parts))
            least = min(least, self.now() - begin)
        return self._buffer.nbytes / least

    def peak(self, isa: str) -> float:
        """Multiplications a second of bytes or, with tiles, of bfloat16, by ``isa``; NaN where ``peak.c`` has none."""
        library = self._library(isa, _FLAGS.get(isa, []))
        begin = self.now()
        made = list(self._threads.map(lambda _: library.multiply(_ROUNDS), range(self._count)))
        return sum(made) / (self.now() - begin) if made[0] else float("nan")

    def _library(self, name: str, flags: list[str]) -> ctypes.CDLL:
        if name not in self._libraries:
            self._libraries[name] = _compiled(self._compiler, flags)
        return self._libraries[name]


def _compiled(compiler: str, flags: list[str]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as place:
        built = Path(place) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", *flags, source, "-o", built], check=True)
        library = ctypes.CDLL(str(built))
    library.plain_read.argtypes, library.plain_read.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    library.multiply.argtypes, library.multiply.restype = (ctypes.c_uint64,), ctypes.c_uint64
    return library
