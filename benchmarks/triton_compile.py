"""Compile the Triton kernels without a GPU and print what they take: registers, spilled bytes, shared memory.

Every kernel that a step launches is compiled, with the arguments with which it is launched. NVIDIA's numbers are those
of ``cuobjdump`` for the finished code, AMD's those in the assembler text. ``cycles``, of NVIDIA's kernels with a loop
of products: issue cycles of a multiprocessor for one turn of the loop with the most products (a page of a KV head in
``decode_splits``), as in ``cuda_cycles.py``.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from cuda_cycles import SCHEDULERS, loops, tool
from report import write
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvbits.codecs import SCHEMES, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.triton.backend import TritonBackend
from kvbits.pool import PagedPool

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers of a thread, spilled bytes of a thread, shared memory of a program in bytes; issue
    cycles of its loop of products, 0 where none is known."""

    dtype: str
    kernel: str
    target: str
    warps: int
    registers: int
    spilled: int
    shared: int
    cycles: int


@dataclass(frozen=True)
class Launched:
    """A launch that was recorded instead of run."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def record(dtype: str, layer: LayerGeometry, queries: torch.dtype) -> list[Launched]:
    """What a step of two sequences launches, one with a new token and one with 70, over 16 and 1 sealed pages."""
    found: list[Launched] = []

    def launch(kernel: Any, grid: Any, args: tuple[Any, ...], constants: dict[str, Any], **options: Any) -> None:
        found.append(Launched(kernel, args, constants, options))

    geometry = ModelGeometry("compiled", (layer, layer), 4096, 16)
    pool = PagedPool(geometry, parse_policy(dtype, 2), 1 << 27)
    view = pool.layers[1]
    frames = pool.layout.open.frames
    slices = [
        SequencePages(1030, 1, range(16), range(50, 50 + frames), range(50, 50 + frames)),
        SequencePages(64, 70, range(20, 22), range(60, 60 + frames), range(60, 60 + frames)),
    ]
    query, key, value = (
        torch.zeros(71, heads, dim, dtype=queries)
        for heads, dim in (
            (layer.num_heads, layer.key_dim),
            (layer.num_kv_heads, layer.key_dim),
            (layer.num_kv_heads, layer.value_dim),
        )
    )
    # named a GPU for the backend's own check; nothing runs there
    TritonBackend("cuda", launch).forward(view, BatchLayout.of(slices), query, key, value, None)
    return found


def _divisible(x: Any, path: tuple[int, ...], attributes: dict[tuple[int, ...], Any]) -> None:
    """What Triton finds out of the arguments when it launches: pointers and numbers that 16 divides."""
    if isinstance(x, tuple):
        for i, part in enumerate(x):
            _divisible(part, (*path, i), attributes)
    elif (isinstance(x, torch.Tensor) and x.data_ptr() % 16 == 0) or (isinstance(x, int) and x % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]


def _type(x: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any]) -> Any:
    if isinstance(x, tuple):
        return tuple(_type(part, (*path, i), constants) for i, part in enumerate(x))
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    if isinstance(x, int) and not isinstance(x, bool) and x != 1:
        return "i32"
    constants[path] = x
    return "constexpr"


def compile_launch(launched: Launched, target: GPUTarget) -> Any:
    """The compiled kernel; raises what Triton raises when that fails."""
    names = launched.kernel.arg_names
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    signature = {}
    for i, x in enumerate(launched.args):
        if launched.kernel.params[i].do_not_specialize:
            signature[names[i]] = "i32"
            continue
        signature[names[i]] = _type(x, (i,), constants)
        _divisible(x, (i,), attributes)
    for name, x in launched.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = x
    source = ASTSource(launched.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launched.options)


def usage_of(compiled: Any, target: GPUTarget, warps: int) -> tuple[int, int, int]:
    """Registers and spilled bytes of a thread, and cycles of the loop of products."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return _number(r"\.vgpr_count:\s+", text), _number(r"\.private_segment_fixed_size:\s+", text), 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, code = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", file.name)
    return _number("REG:", text), _number("STACK:", text), round(_loop_length(code) * warps / SCHEDULERS)


def _loop_length(code: str) -> int:
    """Instructions of the innermost of the loops with the most products."""
    sizes = [(sum(name == "HMMA" for name, _, _ in body), -len(body)) for body in loops(code)]
    products, length = max(sizes, default=(0, 0))
    return -length if products else 0


def _number(before: str, text: str) -> int:
    """The number behind ``before`` (a pattern)."""
    match = re.search(rf"{before}(\d+)", text)
    assert match is not None, (before, text)
    return int(match[1])


def measure(dtype: str, layer: LayerGeometry, queries: torch.dtype, target: str, kernels: str = "") -> list[Usage]:
    """Compile what a step launches for ``dtype`` (kernels whose name begins with ``kernels``), each kernel once."""
    results: dict[str, Usage] = {}
    for launched in record(dtype, layer, queries):
        if launched.name in results or not launched.name.startswith(kernels):
            continue
        compiled = compile_launch(launched, TARGETS[target])
        warps, shared = launched.options["num_warps"], compiled.metadata.shared
        registers, spilled, cycles = usage_of(compiled, TARGETS[target], warps)
        results[launched.name] = Usage(dtype, launched.name, target, warps, registers, spilled, shared, cycles)
    return list(results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=list(SCHEMES), help="KV cache dtypes; all of them")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only kernels whose name begins so")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, nargs=2, default=(128, 128), metavar=("KEY", "VALUE"))
    parser.add_argument("--queries", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    (heads, kv_heads), (key_dim, value_dim) = args.heads, args.head_dim
    layer = LayerGeometry(heads, kv_heads, key_dim, value_dim, key_dim**-0.5)
    results = []
    print(f"{'dtype':10} {'kernel':22} {'target':7} warps registers spilled shared cycles", flush=True)
    for dtype in args.dtype:
        for target in args.target:
            for u in measure(dtype, layer, getattr(torch, args.queries), target, args.kernels):
                results.append(u)
                row = f"{u.warps:5} {u.registers:9} {u.spilled:7} {u.shared:6} {u.cycles:6}"
                print(f"{u.dtype:10} {u.kernel:22} {u.target:7} {row}", flush=True)
    if args.json:
        write(args.json, {"rows": [asdict(u) for u in results]})


if __name__ == "__main__":
    main()
