"""Read bandwidth of the memory with all threads: the yardstick of every share that the other benchmarks give.

    python benchmarks/bandwidth.py --json out/bandwidth.json

No single way of reading is the fastest on every machine, so several are timed, in turns, over a buffer far larger than
the caches, with 4 KiB and with huge pages; the yardstick is the fastest one's median. Every byte of the buffer is
written before (an untouched page would be read from one shared page of zeros, that is from the cache).
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy
import torch
from report import facts_of, plain_parser, publish

_FILL = 1
"""What every byte of the buffer holds; ``memchr`` searches for another value and so reads to the end."""


@dataclass(frozen=True)
class Reading:
    """One way of reading the buffer, and the seconds of its repeats."""

    method: str
    pages: str
    seconds: list[float]
    size: int

    @property
    def bytes_per_s(self) -> float:
        return self.size / statistics.median(self.seconds)

    def row(self) -> dict[str, float | str]:
        return {
            "method": self.method,
            "pages": self.pages,
            "gb_per_s": self.bytes_per_s / 1e9,
            "gb_per_s_min": self.size / max(self.seconds) / 1e9,
            "gb_per_s_max": self.size / min(self.seconds) / 1e9,
        }


def make_buffer(size: int, huge: bool) -> mmap.mmap:
    """``size`` bytes of anonymous memory, all written, in huge pages where asked and the system grants them."""
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    torch.frombuffer(buffer, dtype=torch.uint8).fill_(_FILL)
    return buffer


def methods(buffer: mmap.mmap, threads: int, pool: ThreadPoolExecutor) -> dict[str, Callable[[], None]]:
    """Ways of reading the whole buffer once with ``threads`` threads; each checks what it read."""
    size = len(buffer)
    words = torch.frombuffer(buffer, dtype=torch.int64)
    array = numpy.frombuffer(buffer, dtype=numpy.int64)
    edges = [size * i // threads // 64 * 64 for i in range(threads + 1)]
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    word = int(array[0])

    def search(part: int) -> int | None:
        found: int | None = memchr(start + edges[part], _FILL + 1, edges[part + 1] - edges[part])
        return found

    def by_memchr() -> None:
        assert not any(pool.map(search, range(threads)))

    def largest(part: int) -> int:
        return int(array[edges[part] // 8 : edges[part + 1] // 8].max())

    def by_numpy() -> None:
        assert set(pool.map(largest, range(threads))) == {word}

    def by_torch_max() -> None:
        assert int(words.max()) == word

    def by_torch_sum() -> None:
        assert int(words.sum()) == (word * len(words) + 2**63) % 2**64 - 2**63

    return {
        "libc memchr, threads": by_memchr,
        "numpy int64 max, threads": by_numpy,
        "torch int64 max": by_torch_max,
        "torch int64 sum": by_torch_sum,
    }


def measure(threads: int, size: int = 1 << 30, repeats: int = 9) -> list[Reading]:
    """Time every method, in turns, fastest first. ``size`` is the bytes of a buffer, a multiple of 4 MiB."""
    assert size % (1 << 22) == 0, size
    with ThreadPoolExecutor(threads) as pool:
        ways: dict[tuple[str, str], Callable[[], None]] = {}
        for pages, huge in (("4 KiB", False), ("huge", True)):
            for name, read in methods(make_buffer(size, huge), threads, pool).items():
                ways[name, pages] = read
        seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, read in ways.items():
                begin = time.perf_counter()
                read()
                if repeat:  # the first one starts threads
                    seconds[way].append(time.perf_counter() - begin)
    readings = [Reading(*way, times, size) for way, times in seconds.items()]
    return sorted(readings, key=lambda reading: -reading.bytes_per_s)


def read_bandwidth(threads: int | None = None, size: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second of the fastest method's median, with ``threads`` threads (default: torch's)."""
    return measure(threads or torch.get_num_threads(), size, repeats)[0].bytes_per_s


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mib", type=int, default=1024, help="size of the buffer, a multiple of 4")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    readings = measure(args.threads, args.mib << 20, args.repeats)
    best = readings[0].bytes_per_s / 1e9
    notes = f"Read bandwidth with {args.threads} threads: {best:.1f} GB/s"
    facts = facts_of(args) | {"read_bandwidth_gb_per_s": best}
    publish("Read bandwidth", {"rows": [reading.row() for reading in readings]}, facts, args.json, notes=notes)


if __name__ == "__main__":
    main()
