"""Time one configuration of vLLM's CPU engine; run by the interpreter that has vLLM.

All prompts are given at once as token ids. Prefill ends with the last sequence's first token; then the same prompts,
which the prefix cache holds by then, decode together. Prints one JSON object on a line of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

_ROOM = 64
"""Tokens of a sequence beside prompt and answer: a block that is not full."""


def cache_bytes(model: Path, tokens: int) -> int:
    """Room for so many tokens in 16 bit, and a little more."""
    config = json.loads((model / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(1.1 * tokens * 4 * config["num_hidden_layers"] * heads * dim) + (64 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of safetensors")
    parser.add_argument("--cache", required=True, help="vLLM's --kv-cache-dtype")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--start-only", action="store_true", help="end after the first short prompt")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from peers.workers.vllm_engine import Engine

    longest = arguments.context + arguments.new_tokens + _ROOM
    memory = cache_bytes(arguments.model, arguments.batch * longest)
    engine = Engine(str(arguments.model), arguments.cache, longest, arguments.batch, memory)
    engine.run([engine.tokens(16)], 2)
    if arguments.start_only:
        return
    prompts = [engine.tokens(arguments.context) for _ in range(arguments.batch)]
    begin = time.perf_counter()
    prefill_s = engine.run(prompts, 1)[-1][0] - begin
    result = {
        "prefill_tokens_per_s": arguments.batch * arguments.context / prefill_s,
        "decode_tokens_per_s": engine.decode(prompts, arguments.new_tokens),
    }
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
