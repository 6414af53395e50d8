"""The engine's steps on a GPU, with random weights in the shape of a known model; beside them transformers' own.

    python benchmarks/gpu_engine.py --shape qwen3-8b --batch 16 --context 8192 [--dtype int8 int4 ...] [--json FILE]

``prefill``: tokens per second of all prompts; ``step``: the median of the decode steps' wall times, all sequences at
once; ``bytes``: what a step has to read, weights and sealed pages, at the bandwidth that a copy reaches here; ``off``:
the root mean square of the logits' differences from transformers' own attention, over the logits'.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import write
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvbits.config import PAGE_TOKENS
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.models import LoadedModel
from kvbits.models.load import wrap

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "llama",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        },
    ),
    "tiny": (
        "qwen3",
        {
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def model_of(shape: str, device: str) -> Any:
    """A model of random weights, ``bfloat16``."""
    kind, options = SHAPES[shape]
    config = AutoConfig.for_model(kind, max_position_embeddings=131072, **options)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def wait(device: str) -> None:
    torch.get_device_module(device).synchronize()


def wall(call: Callable[[], object], device: str, times: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(times):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - begin)
    return found


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.randint(0, 255, (1 << 30 if device != "cpu" else 1 << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(wall(lambda: target.copy_(source), device, 10)[2:])


@torch.inference_mode()
def own_step(model: Any, prompts: list[list[int]], device: str) -> float:
    """Median seconds of a decode step of transformers' own code, SDPA and a plain cache, not compiled."""
    cache, ids = DynamicCache(config=model.config), torch.tensor(prompts, device=device)
    for at in range(0, ids.shape[1], 1024):
        model(input_ids=ids[:, at : at + 1024], past_key_values=cache, logits_to_keep=1)
    return statistics.median(wall(lambda: model(input_ids=ids[:, -1:], past_key_values=cache), device, 12)[2:])


def measure(
    loaded: LoadedModel, dtype: str, prompts: list[list[int]], tokens: int, expected: torch.Tensor,
    config: EngineConfig, bandwidth: float, limit: float,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of prefill and of decode steps; gives up after ``limit`` seconds."""
    device = loaded.device.type
    begin = time.perf_counter()
    engine = Engine(loaded, config)
    ready = time.perf_counter() - begin
    probe = prompts[0][: expected.shape[0] + PAGE_TOKENS]
    got = torch.cat([logits for _, logits in engine.teacher_forced(probe, PAGE_TOKENS)]).float().cpu()
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    wait(device)
    begin = now = time.perf_counter()
    prefill, steps, before = 0.0, [], dict(engine.stats.seconds)
    while engine.has_unfinished() and now - begin < limit:
        decoding = not engine.scheduler.waiting and all(r.remaining == 1 for r in engine.scheduler.running)
        if decoding and not prefill:
            prefill, before = now - begin, dict(engine.stats.seconds)
        last, now = now, (engine.step(), time.perf_counter())[1]
        if decoding and len(engine.scheduler.running) == len(prompts):
            steps.append(now - last)
    if not steps:
        raise SystemExit(f"{dtype}: no decode step in {limit:.0f} s")
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    places = [(view.sealed, view.geometry) for view in engine.pool.layers]
    pages = sum(place.scheme.layer_bytes(layer) for place, layer in places)
    size = weights + len(prompts) * (len(prompts[0]) // PAGE_TOKENS) * pages
    step = statistics.median(steps)
    return {
        "dtype": dtype, "ready_seconds": ready, "prefill_tokens_per_second": sum(map(len, prompts)) / prefill,
        "step_seconds": step, "bytes": size, "times_the_bytes": step * bandwidth / size,
        "logits_off": float((got - expected).norm() / expected.norm()), "kernels": engine.kernels,
        "graphs": engine._runner.graphs is not None and engine._runner.graphs.off is None,
        "phases": {name: (s - before[name]) / len(steps) for name, s in engine.stats.seconds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=48, help="that are generated")
    parser.add_argument("--kv-cache-memory", default="24GiB")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each dtype")
    parser.add_argument("--layers", choices=["fused", "transformers"], default="fused", help="who computes them")
    parser.add_argument("--without-transformers", action="store_true", help="leave out its own step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth(args.device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s, read and written", flush=True)
    model = model_of(args.shape, args.device)
    g = torch.Generator().manual_seed(1)
    length = args.context - args.tokens
    prompts = [torch.randint(4, model.config.vocab_size, (length,), generator=g).tolist() for _ in range(args.batch)]
    with torch.inference_mode():  # before the attention is changed
        probe = torch.tensor([prompts[0][: min(300, length)]], device=args.device)
        expected = model(input_ids=probe).logits[0, PAGE_TOKENS:].float().cpu()
    results: list[dict[str, Any]] = []
    if not args.without_transformers:
        seconds = own_step(model, prompts, args.device)
        print(f"transformers, SDPA, bf16: step {seconds * 1e3:.2f} ms", flush=True)
        results.append({"dtype": "transformers", "step_seconds": seconds})
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kvbits").setLevel(logging.INFO)  # why layers do not run fused
    loaded = wrap(model, None, args.shape)
    if args.layers == "transformers":
        loaded = replace(loaded, fused=None)
    layers = "transformers' own code" if loaded.fused is None else "fused"
    print(f"layers: {layers}", flush=True)
    print("dtype   ready s  prefill tok/s  step ms  of its bytes     off  graphs  kernels", flush=True)
    for dtype in args.dtype:
        config = EngineConfig.of(
            kv_cache_dtype=dtype, kv_cache_memory=args.kv_cache_memory, max_num_seqs=args.batch,
            max_num_batched_tokens=args.max_num_batched_tokens, max_model_len=args.context + PAGE_TOKENS,
        )  # fmt: skip
        r = measure(loaded, dtype, prompts, args.tokens, expected, config, bandwidth, args.limit)
        times = f"{r['prefill_tokens_per_second']:14.0f} {r['step_seconds'] * 1e3:8.2f} {r['times_the_bytes']:12.2f}x"
        print(f"{dtype:7}{r['ready_seconds']:8.1f} {times} {r['logits_off']:7.4f}  {r['graphs']!s:6}  {r['kernels']}")
        print("   ", {name: f"{s * 1e3:.2f} ms" for name, s in r["phases"].items()}, flush=True)
        results.append(r)
    if args.json:
        name = torch.get_device_module(args.device).get_device_name() if args.device != "cpu" else "cpu"
        about = {"device": name, "shape": args.shape, "layers": layers, "copy_bytes_per_second": bandwidth}
        write(args.json, {**about, "results": results})


if __name__ == "__main__":
    main()
