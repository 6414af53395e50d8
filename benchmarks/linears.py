"""Products with weights alone: each format and instruction set, few rows and many, against what the machine can do.

    python benchmarks/linears.py --json out/linears.json [--format q4_k ...] [--isa avx512 ...] [--rows 1 512]

Weights of one shape are repeated until they are far larger than the processor's caches. Few rows should read them as
fast as a plain loop reads memory (``read_share``); many should multiply as fast as the instruction for dot products of
bytes does in registers, with AMX that for tiles of bfloat16 (``peak_share``). Each product alternates with its
yardstick; figures are medians, of ratios too, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from report import Row, bars, facts_of, plain_parser, publish
from yardsticks import Yardsticks

from kvbits.kernels.cpu import available_isas
from kvbits.kernels.hugepages import collapse_to_huge_pages
from kvbits.kernels.products import PackedWeight, Products
from kvbits.weights import FORMATS, WeightFormat

FEW_ROWS = 16


def random_weight(weight_format: WeightFormat, out_features: int, in_features: int) -> PackedWeight:
    """Random codes with small finite scales."""
    rng = np.random.default_rng(0)
    blocks = -(-in_features // weight_format.block)
    rows = rng.integers(0, 40, (out_features, blocks * weight_format.block_bytes), dtype=np.uint8)
    packed = PackedWeight.empty(out_features, in_features, weight_format)
    packed.fill(rows)
    return packed


class Case:
    """A format's weights, together of ``mib`` MiB, times rows."""

    def __init__(self, weight_format: WeightFormat, shape: tuple[int, int], mib: int) -> None:
        first = random_weight(weight_format, *shape)
        count = max(1, (mib << 20) // first.bytes)
        self.weights = [first, *(random_weight(weight_format, *shape) for _ in range(count - 1))]

    def seconds(self, products: Products, x: torch.Tensor, most: int, yardsticks: Yardsticks) -> float:
        """Of one weight, on average over ``most`` of them."""
        chosen = self.weights[:most]
        begin = yardsticks.now()
        for weight in chosen:
            products.apply(weight, x)
        return (yardsticks.now() - begin) / len(chosen)


def measure(
    name: str, isa: str, shape: tuple[int, int], rows: list[int], mib: int, repeats: int, yardsticks: Yardsticks
) -> list[Row]:
    """A row of figures for each number of rows."""
    case, products = Case(FORMATS[name], shape, mib), Products(isa)
    collapse_to_huge_pages()
    found = []
    for count in rows:
        x = torch.randn(count, shape[1]).to(torch.bfloat16)
        most = len(case.weights) if count <= FEW_ROWS else 4
        seconds, reads, peaks = [], [], []
        for repeat in range(repeats + 1):
            read, peak = yardsticks.read(), yardsticks.peak(isa)
            took = case.seconds(products, x, most, yardsticks)
            if repeat:
                seconds.append(took)
                reads.append(case.weights[0].bytes / took / read)
                peaks.append(count * shape[0] * shape[1] / took / peak)
        middle = statistics.median(seconds)
        found.append(
            {
                "format": name,
                "isa": isa,
                "rows": count,
                "us": 1e6 * middle,
                "gb_per_s": case.weights[0].bytes / middle / 1e9,
                "read_share": statistics.median(reads),
                "gmac_per_s": count * shape[0] * shape[1] / middle / 1e9,
                "peak_share": statistics.median(peaks),
            }
        )
    return found


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--format", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--isa", nargs="+", default=available_isas()[:1], choices=available_isas())
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--out-features", type=int, default=8960)
    parser.add_argument("--in-features", type=int, default=1536)
    parser.add_argument(
        "--mib", type=int, default=256, help="of weights in a format, and of the plain read, a multiple of 4"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time by this process's processor time, one thread")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    yardsticks = Yardsticks(args.threads, args.mib, args.cpu_time)
    shape = (args.out_features, args.in_features)
    rows: list[Row] = []
    for isa in args.isa:
        for name in args.format:
            rows += measure(name, isa, shape, args.rows, args.mib, args.repeats, yardsticks)
    facts = facts_of(args)
    figure = bars("Products alone", rows, ("isa", "format", "rows"), "read_share")
    publish("Products alone", {"rows": rows}, facts, args.json, figure, picture=args.picture)


if __name__ == "__main__":
    main()
