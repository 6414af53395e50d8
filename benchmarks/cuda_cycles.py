"""Compile the CUDA kernels without a GPU and count, in the machine code of their page loop, what a page and head cost.

    python benchmarks/cuda_cycles.py [--dtype int4 int4/int8 ...] [--arch sm_90 ...] [--head-dim 128] [--rows 8]

Each instruction of the loop takes one of the four schedulers of a multiprocessor one cycle (``issue``); beside it the
pipes that take longer: ``alu`` (integers, logic, permutes: two cycles), ``tensor`` (products of 16 x 8 x 16: eight
cycles on sm_80 and sm_89, four on sm_90 and later), ``shared`` (128 bytes a cycle and multiprocessor). Every
instruction in the loop counts, those of masked pages too, which few pages need. ``memory``: cycles that an H100's
memory (3.35 TB/s, 132 multiprocessors, 1.755 GHz) takes for the page. ``ahead``: instructions of the warp from a load
of codes to its first use, the least and the mean. Needs NVRTC (with torch's CUDA builds, or ``pip install
nvidia-cuda-nvrtc-cu12``) and ``nvdisasm`` and ``cuobjdump``, which come with Triton.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from report import write

from kvbits.codecs import SCHEMES
from kvbits.config import LayerGeometry
from kvbits.kernels.cuda.nvrtc import compiled
from kvbits.kernels.cuda.variant import Variant, variant_of

SCHEDULERS = 4
H100_BYTES = 3.35e12 / 132 / 1.755e9
ALU = {
    *("LOP3", "PRMT", "SHF", "IADD3", "ISETP", "SEL", "FSETP", "FMNMX", "FSEL", "LEA", "IABS", "VIADD", "VIMNMX"),
    *("PLOP3", "MOV", "HMNMX2", "P2R", "R2P", "VOTE"),
}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True)
class Count:
    """Of the page loop; cycles of a multiprocessor for a page and head, registers and bytes of a thread."""

    dtype: str
    arch: str
    head_dim: int
    rows: int
    issue: float
    alu: float
    tensor: float
    shared: float
    memory: float
    ahead: list[int]
    registers: int
    spilled: int
    shared_bytes: int
    instructions: dict[str, int]


def loops(code: str) -> list[list[tuple[str, str, str]]]:
    """Of every loop in ``nvdisasm``'s text: name, suffixes and operands of its instructions."""
    instructions: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    found = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _LINE.search(line):
            instructions.append((match[2], match[3], match[4]))
            target = re.search(r"`\((\.L_x_\d+)\)", match[4])
            if match[2] == "BRA" and target and target[1] in labels:
                found.append(instructions[labels[target[1]] :])
    return found


def page_loop(code: str) -> list[tuple[str, str, str]]:
    """The inmost loop around transposed weights.

    The own page's code has transpositions too; the loop around both is longer.
    """
    around = [body for body in loops(code) if any(name == "MOVM" for name, _, _ in body)]
    assert around, "no loop with transposed weights"
    return min(around, key=len)


def ahead(loop: list[tuple[str, str, str]]) -> list[int]:
    """Instructions of the warp from each load of codes to the first that needs it, around the loop."""
    found = []
    for i, (name, rest, operands) in enumerate(loop):
        if name != "LDG" or ".128" not in rest:
            continue
        first = int(operands.split(",")[0].strip()[1:])
        wanted = re.compile("|".join(rf"\bR{first + k}\b" for k in range(4)))
        for distance in range(1, len(loop)):
            sources = loop[(i + distance) % len(loop)][2].partition(",")[2]
            if wanted.search(sources):
                found.append(distance)
                break
    return found


def count(dtype: str, variant: Variant, arch: str, page_bytes: int) -> Count:
    cubin = compiled(arch, variant.defines)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (
            tool(name, option, file.name) for name, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    loop = page_loop(code)
    names = Counter(name for name, _, _ in loop)
    tensor = 4 if int(arch.split("_")[1]) >= 90 else 8
    accesses = sum(
        4 if ".128" in rest else 2 if ".64" in rest else 1 for name, rest, _ in loop if name in ("LDS", "STS")
    )
    registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))  # type: ignore[index]
    return Count(
        dtype, arch, variant.dim, 8 * variant.tiles,
        issue=len(loop) / SCHEDULERS,
        alu=2 * sum(n for name, n in names.items() if name in ALU) / SCHEDULERS,
        tensor=tensor * names["HMMA"] / SCHEDULERS,
        shared=float(accesses),
        memory=page_bytes / H100_BYTES, ahead=ahead(loop),
        registers=registers, spilled=stack, shared_bytes=variant.shared_bytes,
        instructions=dict(names.most_common()),
    )  # fmt: skip


def tool(name: str, option: str, file: str) -> str:
    """What NVIDIA's tool ``name``, of those that come with Triton, prints about ``file``."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, option, file], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4", "int2", "nf4"])
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_89", "sm_90", "sm_100"])
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256))
    parser.add_argument("--rows", type=int, default=8, choices=(8, 16), help="query heads of a KV head, times queries")
    parser.add_argument("--softcap", action="store_true")
    parser.add_argument("--instructions", action="store_true", help="print how often each instruction occurs")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    results = []
    print("dtype     arch   issue   alu tensor shared memory    ahead registers spilled shared bytes")
    for dtype in args.dtype:
        key, _, value = dtype.partition("/")
        scheme = type(SCHEMES[key])(SCHEMES[key].key, SCHEMES[value or key].value)
        layer = LayerGeometry(args.rows, 1, args.head_dim, args.head_dim, 1.0, softcap=30.0 if args.softcap else None)
        variant = variant_of(scheme, layer, args.rows)
        assert isinstance(variant, Variant), variant
        for arch in args.arch:
            c = count(dtype, variant, arch, scheme.head_bytes(layer))
            results.append(asdict(c))
            cycles = f"{c.issue:5.0f} {c.alu:5.0f} {c.tensor:6.0f} {c.shared:6.0f} {c.memory:6.0f}"
            near = f"{min(c.ahead):4} {sum(c.ahead) / len(c.ahead):4.0f}"
            print(f"{dtype:9} {arch:6} {cycles} {near} {c.registers:8} {c.spilled:7} {c.shared_bytes:12}", flush=True)
            if args.instructions:
                print("   ", ", ".join(f"{n} {name}" for name, n in c.instructions.items()))
    if args.json:
        write(args.json, {"results": results})


if __name__ == "__main__":
    main()
