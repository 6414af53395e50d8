"""Time one configuration of Hugging Face transformers; run by the peers' own interpreter.

A greedy loop over ``model(...)`` with the library's own cache classes: no sampling, no stopping rules, logits of the
last position only, so it is never slower than ``generate``. Prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

_WARM_UP = 2
"""Decode steps before the timed ones."""


def new_cache(kind: str, config: Any) -> Any:
    """An empty cache: ``bf16`` keeps 16 bits, ``quanto4`` is the library's quantized cache with its own defaults."""
    if kind == "bf16":
        return DynamicCache(config=config)
    return QuantizedCache(backend="quanto", config=config, nbits=4)


def run(model: Any, kind: str, prompts: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds of the prefill of ``prompts [batch, tokens]`` and of the median of ``new_tokens`` decode steps."""
    cache = new_cache(kind, model.config)
    start = time.perf_counter()
    logits = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    prefill_s = time.perf_counter() - start
    steps = []
    for _ in range(_WARM_UP + new_tokens):
        begin = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        steps.append(time.perf_counter() - begin)
    return {"prefill_s": prefill_s, "step_s": statistics.median(steps[_WARM_UP:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--cache", choices=("bf16", "quanto4"), required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--start-only", action="store_true", help="end after the first short prompt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = Path(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(2)
    shape = (arguments.batch, arguments.context)
    prompts = torch.randint(100, model.config.vocab_size, shape, generator=generator)
    with torch.inference_mode():
        run(model, arguments.cache, prompts[:, :16], 2)
        if arguments.start_only:
            return
        timing = run(model, arguments.cache, prompts, arguments.new_tokens)
    result = {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "prefill_tokens_per_s": arguments.batch * arguments.context / timing["prefill_s"],
        "decode_tokens_per_s": arguments.batch / timing["step_s"],
        **timing,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
