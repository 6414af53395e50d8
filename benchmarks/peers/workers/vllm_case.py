"""One case in vLLM: ``python vllm_case.py MODEL KV BATCH CONTEXT NEW_TOKENS``, with the Python that has vLLM.

KV is vLLM's own ``auto`` or ``fp8``, or a policy of kvbits' plug-in. Prints one line of JSON. The first round, which
compiles, is not timed.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def main() -> None:
    model, kv, (batch, context, new) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
    from vllm import LLM, SamplingParams

    own = kv in ("auto", "fp8")
    llm = LLM(
        model,
        dtype="bfloat16",
        kv_cache_dtype=kv if own else "auto",
        additional_config={} if own else {"kvbits": {"policy": kv}},
        kv_cache_memory_bytes=max(1 << 29, batch * (context + 2 * new) * 65536),
        max_model_len=context + new + 64,
        max_num_seqs=batch,
        enable_prefix_caching=False,
    )
    numbers = np.random.default_rng(0)

    def seconds(tokens: int) -> float:
        prompts = [{"prompt_token_ids": numbers.integers(100, 10_000, context).tolist()} for _ in range(batch)]
        begin = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - begin

    seconds(4)
    prefill = min(seconds(1) for _ in range(2))
    whole = seconds(1 + new)
    decode = batch * new / max(whole - prefill, 1e-9)
    print("RESULT", json.dumps({"prefill": batch * context / prefill, "decode": decode}), flush=True)


if __name__ == "__main__":
    main()
