"""How fast one core codes blocks of another engine's cache: what LMCache's serializer and vLLM's tier do.

    python benchmarks/chunk_speed.py --json out/chunk_speed.json

A chunk of bfloat16 rows goes through the coder in one thread, header and checksum included; GB of 16-bit rows a second,
by CPU time, the median of ``--repeats``, and how many times fewer bytes are kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import facts_of, publish
from torch import Tensor

from kvbits.codecs import parse_policy
from kvbits.kernels.chunks import ChunkCoder


def speed(run: Callable[[], object], gigabytes: float, repeats: int) -> float:
    run()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        found.append(gigabytes / (time.process_time() - begin))
    return statistics.median(found)


def measured(coder: ChunkCoder, chunk: Tensor, repeats: int) -> dict[str, float]:
    data, rows = torch.empty(coder.size(chunk.shape[2]), dtype=torch.uint8), [coder.heads(chunk)]
    back, gigabytes = [torch.empty_like(rows[0])], chunk.nbytes / 1e9
    return {
        "times_fewer_bytes": chunk.nbytes / len(data),
        "encode_gb_s": speed(lambda: coder.encode(rows, "m", data), gigabytes, repeats),
        "decode_gb_s": speed(lambda: coder.decode(data, "m", back), gigabytes, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["int8", "int4", "int3"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("out/chunk_speed.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    chunk = torch.randn(2, args.layers, args.tokens, args.kv_heads * args.head_size).bfloat16()
    rows = []
    for policy in args.policy:
        coder = ChunkCoder(parse_policy(policy, args.layers), args.kv_heads, args.head_size)
        rows.append({"policy": policy, **measured(coder, chunk, args.repeats)})
        print(rows[-1], flush=True)
    publish("Chunks in a policy's bits, one core", {"rows": rows}, facts_of(args, "json"), args.json)


if __name__ == "__main__":
    main()
