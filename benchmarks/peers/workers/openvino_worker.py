"""Time one configuration of OpenVINO GenAI's continuous batching; run by the peers' own interpreter.

Prints one JSON object on the last line. Prompts are given as token ids, so every system gets the same number of
tokens; the end-of-sequence token is ignored, so every sequence decodes the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import numpy
import openvino
import openvino_genai

_BLOCK_TOKENS = 32
"""Tokens in one KV block of OpenVINO's CPU plugin."""

_WARM_UP = 2
"""Decode steps before the timed ones."""


def build(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the properties it was built with."""
    scheduler = openvino_genai.SchedulerConfig()
    tokens = arguments.context + arguments.new_tokens + arguments.batch * -(-arguments.context // arguments.chunk) + 64
    scheduler.num_kv_blocks = arguments.batch * (-(-tokens // _BLOCK_TOKENS) + 1)
    scheduler.max_num_batched_tokens = arguments.chunk
    scheduler.max_num_seqs = arguments.batch
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": arguments.threads}
    if arguments.key_precision == arguments.value_precision:
        properties["KV_CACHE_PRECISION"] = arguments.key_precision
    else:
        properties["KEY_CACHE_PRECISION"] = arguments.key_precision
        properties["VALUE_CACHE_PRECISION"] = arguments.value_precision
    return openvino_genai.ContinuousBatchingPipeline(arguments.model, scheduler, "CPU", properties), properties


def serve(pipeline: Any, arguments: argparse.Namespace, context: int, new_tokens: int, seed: int) -> dict[str, float]:
    """Prefill random prompts of ``context`` tokens, then decode ``new_tokens`` steps; seconds, and of the median step.

    Prefill ends with the step that gives the last sequence its first token. With chunks smaller than the prompts the
    earlier sequences decode meanwhile, so each may generate more tokens than are timed: the timed steps always have
    the whole batch in them.
    """
    generator = random.Random(seed)
    batch = arguments.batch
    earlier = batch * -(-context // max(1, arguments.chunk - batch))
    config = openvino_genai.GenerationConfig(
        max_new_tokens=_WARM_UP + new_tokens + earlier + 2, ignore_eos=True, do_sample=False, apply_chat_template=False
    )
    handles = []
    for index in range(batch):
        prompt = numpy.array([[generator.randrange(100, arguments.vocab) for _ in range(context)]], dtype=numpy.int64)
        handles.append(pipeline.add_request(index, openvino.Tensor(prompt), config))
    received = [0] * batch

    def step() -> None:
        pipeline.step()
        for index, handle in enumerate(handles):
            while handle.can_read():
                received[index] += sum(len(output.generated_ids) for output in handle.read().values())

    start = time.perf_counter()
    while min(received) == 0:
        step()
    prefill_s = time.perf_counter() - start
    before = sum(received)
    steps = []
    for _ in range(_WARM_UP + new_tokens):
        begin = time.perf_counter()
        step()
        steps.append(time.perf_counter() - begin)
    decoded = sum(received) - before
    if decoded != batch * len(steps):
        raise RuntimeError(f"{len(steps)} steps of {batch} sequences gave {decoded} tokens")
    for handle in handles:
        handle.stop()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return {"prefill_s": prefill_s, "step_s": statistics.median(steps[_WARM_UP:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="GGUF file or OpenVINO model directory")
    parser.add_argument("--key-precision", required=True)
    parser.add_argument("--value-precision", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--start-only", action="store_true", help="end after the first short prompt")
    parser.add_argument("--chunk", type=int, required=True, help="tokens of one scheduler step")
    parser.add_argument("--vocab", type=int, default=49152)
    arguments = parser.parse_args()
    pipeline, properties = build(arguments)
    serve(pipeline, arguments, context=16, new_tokens=2, seed=1)
    if arguments.start_only:
        return
    timing = serve(pipeline, arguments, arguments.context, arguments.new_tokens, seed=2)
    result = {
        "version": openvino_genai.__version__,
        "properties": properties,
        "prefill_tokens_per_s": arguments.batch * arguments.context / timing["prefill_s"],
        "decode_tokens_per_s": arguments.batch / timing["step_s"],
        **timing,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
