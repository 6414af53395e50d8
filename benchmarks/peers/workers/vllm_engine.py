"""One vLLM engine that measures what it is told: ``python vllm_engine.py MODEL KV MAX_MODEL_LEN MAX_SEQS BYTES``.

KV is vLLM's own ``auto`` or ``fp8``, or a policy of kvbits' plug-in. Each line of standard input is a JSON object, each
answer a line that begins with RESULT: ``{"prefill": tokens}`` a new prompt's tokens a second; ``{"batch", "context",
"steps"}`` the decoding speed of prompts that are in the prefix cache from the second time on.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from typing import Any

import numpy as np


class Engine:
    """Requests through vLLM's own steps."""

    def __init__(self, model: str, kv: str, max_model_len: int, max_seqs: int, memory: int) -> None:
        from vllm import LLM

        own = kv in ("auto", "fp8")
        llm = LLM(
            model,
            dtype="bfloat16",
            kv_cache_dtype=kv if own else "auto",
            additional_config={} if own else {"kvbits": {"policy": kv}},
            kv_cache_memory_bytes=memory,
            max_model_len=max_model_len,
            max_num_seqs=max_seqs,
        )
        self._engine: Any = llm.llm_engine
        self._vocab = min(10_000, self._engine.model_config.get_vocab_size())
        self._numbers = np.random.default_rng(0)
        self._names = 0

    def tokens(self, count: int) -> list[int]:
        found: list[int] = self._numbers.integers(10, self._vocab, count).tolist()
        return found

    def run(self, prompts: list[list[int]], new: int) -> list[tuple[float, int]]:
        """Every step's end and the sequences that it gave a token."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self._names += 1
            self._engine.add_request(str(self._names), {"prompt_token_ids": prompt}, params)
        steps, had = [], dict.fromkeys(range(self._names - len(prompts) + 1, self._names + 1), 0)
        while self._engine.has_unfinished_requests():
            grown = 0
            for output in self._engine.step():
                length = len(output.outputs[0].token_ids)
                grown += length > had[int(output.request_id)]
                had[int(output.request_id)] = length
            steps.append((time.perf_counter(), grown))
        return steps

    def prefill(self, context: int) -> float:
        prompt = self.tokens(context)
        begin = time.perf_counter()
        return context / (self.run([prompt], 1)[-1][0] - begin)

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Of the steps in which all sequences got a token, the first left out."""
        found = self.run(prompts, steps + 2)
        full = [end - start for (start, _), (end, grown) in itertools.pairwise(found) if grown == len(prompts)]
        return len(prompts) / statistics.median(full[1:])


def main() -> None:
    model, kv, *sizes = sys.argv[1:]
    engine = Engine(model, kv, *map(int, sizes))
    known: dict[tuple[int, int], list[list[int]]] = {}
    engine.run([engine.tokens(100)], 4)
    print("RESULT", 0, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "prefill" in asked:
            found = engine.prefill(asked["prefill"])
        else:
            batch, context = asked["batch"], asked["context"]
            if (batch, context) not in known:
                known[batch, context] = [engine.tokens(context) for _ in range(batch)]
                engine.run(known[batch, context], 2)
            found = engine.decode(known[batch, context], asked["steps"])
        print("RESULT", found, flush=True)


if __name__ == "__main__":
    main()
