"""What the engine does from a step's tokens to the next one's replay, while a GPU waits, without a GPU.

    python benchmarks/step_gap.py [--batch 16] [--context 8192] [--steps 60] [--json FILE]

CPU time of one thread, least and median of many decode steps: text, commit, schedule, tables. Recorded steps and
launches do nothing, and tokens are drawn from logits of random numbers, as on a device; ``step``: the whole step,
sampling on the CPU included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_engine import SHAPES
from report import write
from step_host import CudaWithout
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvbits.engine import answer
from kvbits.engine.ahead import Ahead
from kvbits.engine.batch import StepBatch
from kvbits.engine.config import EngineConfig
from kvbits.engine.device_sampler import sample_on_device
from kvbits.engine.engine import Engine
from kvbits.engine.graphs import DecodeGraphs
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.params import SamplingParams
from kvbits.engine.sampler import Sampled
from kvbits.engine.sampling import SamplingState
from kvbits.models import LoadedModel, load_model
from kvbits.models.load import wrap

LAYERS, VOCAB = 4, 1000
"""Of a model that never runs: layers only decide how large the pool is."""


class Clock:
    """CPU times since the last tokens came, at each replay."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self._tokens = 0.0

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        found = sample_on_device(logits, states)
        self._tokens = time.thread_time()
        return found

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        return step().normal_()

    def replay(self) -> None:
        self.gaps.append(time.thread_time() - self._tokens)


def engine_of(loaded: LoadedModel, clock: Clock, batch: int, context: int) -> Engine:
    """An engine whose prompts cost nothing, and whose other steps are 'recorded'."""

    class Runner(ModelRunner):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            loaded, pool, _, backend = parts
            self.graphs = DecodeGraphs(loaded, pool, backend, lambda: clock)

        def run(self, step: StepBatch) -> Tensor:
            return super().run(step) if (step.layout.counts == 1).all() else torch.zeros(len(step.logits_rows), VOCAB)

    backend = CudaWithout()
    backend.graphs = False  # as the device's
    memory = (batch + 1) * (context + 1024) * LAYERS * 2 * 8 * 128  # int4 and its open pages, twice
    config = EngineConfig(
        kv_cache_dtype="int4", kv_cache_memory=memory, max_num_seqs=batch, max_num_batched_tokens=context,
        max_model_len=context + 1024,
    )  # fmt: skip
    engine = Engine(loaded, config, backend, runner=Runner)
    engine._ahead = Ahead(engine.scheduler)  # as on a device
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind, options = SHAPES["qwen3-8b"]
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    config = AutoConfig.for_model(kind, max_position_embeddings=131072, **options | small)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    clock = Clock()
    vars(answer)["sample"] = clock.sample
    engine = engine_of(wrap(model, load_model("smollm2-135m").tokenizer, "gap"), clock, args.batch, args.context)
    prompts = torch.randint(4, VOCAB, (args.batch, args.context)).tolist()
    for i, prompt in enumerate(prompts):  # their pages fill in different steps
        params = SamplingParams(temperature=0.0, max_tokens=args.steps + 900, ignore_eos=True)
        engine.add_request(prompt[: len(prompt) - 4 * i % 64], params)
    while len(clock.gaps) < 4 or engine.load().waiting:
        engine.step()
    clock.gaps.clear()
    steps = []
    for _ in range(args.steps):
        begin = time.thread_time()
        engine.step()
        steps.append(time.thread_time() - begin)
    if len(engine.scheduler.running) != args.batch or len(clock.gaps) != args.steps:
        raise SystemExit(f"{len(engine.scheduler.running)} sequences are left, {len(clock.gaps)} steps were replayed")
    results = {}
    for name, seconds in (("gap", clock.gaps), ("step", steps)):
        results[name] = {"least": min(seconds), "median": statistics.median(seconds)}
        print(f"{name:5}{1e6 * min(seconds):8.0f} us at least {1e6 * statistics.median(seconds):8.0f} median")
    if args.json:
        write(args.json, {"batch": args.batch, "context": args.context, **results})


if __name__ == "__main__":
    main()
