"""transformers' caches and kvbits' in ``model.generate``'s place: time, memory, divergence, and what each can do.

    pip install 'kvbits[bench]'      # transformers' own QuantizedCache needs optimum-quanto
    python benchmarks/hf_cache.py --text book.txt --json out/hf_cache.json [--context 2048 8192]

All caches run the same transformers model (bfloat16). After a prompt of the given length, ``--steps`` known tokens
follow one by one: the median time of such a step, the cache's bytes after it, and the KL of its distributions from
DynamicCache's, in nats a token. The last columns try what a cache can do: a model with sliding windows (a tiny
Gemma-2), and whether drafts from the prompt, rejected ones cropped, leave the tokens what they are without drafts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import Row, bars, facts_of, plain_parser, publish
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache
from transformers import QuantizedCache as LibraryCache

from kvbits.hf import QuantizedCache
from kvbits.models import load_model

Make = Callable[[Any], Cache]


def library(backend: str, bits: int | None) -> Make:
    options = {} if bits is None else {"nbits": bits}
    return lambda model: LibraryCache(backend=backend, config=model.config, **options)


CACHES: dict[str, Make] = {
    "transformers DynamicCache": lambda model: DynamicCache(config=model.config),
    "transformers QuantizedCache quanto 4 bit": library("quanto", 4),
    "transformers QuantizedCache quanto 2 bit": library("quanto", 2),
    "transformers QuantizedCache fp8": library("fp8", None),
    "kvbits bf16": lambda model: QuantizedCache(model, "bf16"),
    "kvbits int8": lambda model: QuantizedCache(model, "int8"),
    "kvbits int4": lambda model: QuantizedCache(model, "int4"),
    "kvbits int2": lambda model: QuantizedCache(model, "int2"),
}


def make(name: str, model: Any) -> Cache:
    """A fresh cache, and the attention that it wants."""
    if not name.startswith("kvbits"):
        model.set_attn_implementation("sdpa")
    return CACHES[name](model)


def nbytes(cache: Cache) -> int:
    """Bytes that the cache keeps between two steps."""
    if isinstance(cache, QuantizedCache):
        return cache.nbytes
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(_tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(_tensor_bytes(v) for v in value)
    inner = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]
    if any(isinstance(part, Tensor) for part in inner):  # quanto's tensor, whose outer shape is that before packing
        return sum(_tensor_bytes(part) for part in inner)
    return value.nbytes if isinstance(value, Tensor) else 0


@torch.inference_mode()
def decode(cache: Cache, model: Any, tokens: Tensor, context: int) -> tuple[float, float, Tensor]:
    """Seconds of the prompt, median seconds of a step, and the steps' log-probabilities ``float32 [steps, vocab]``."""
    start = time.perf_counter()
    model(tokens[:, :context], past_key_values=cache, logits_to_keep=1)
    prompt, steps, logits = time.perf_counter() - start, [], []
    for at in range(context, tokens.shape[1]):
        start = time.perf_counter()
        out = model(tokens[:, at : at + 1], past_key_values=cache)
        steps.append(time.perf_counter() - start)
        logits.append(out.logits[0, -1].float())
    return prompt, statistics.median(steps), torch.log_softmax(torch.stack(logits), -1)


def sliding_windows(name: str) -> str:
    """Whether a model with sliding windows runs."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    try:
        cache = CACHES[name](model)  # with the attention that the model has: this family refuses sdpa
        model.generate(torch.full((1, 80), 5), past_key_values=cache, max_new_tokens=4, do_sample=False)
    except ValueError as error:
        return f"no: {' '.join(str(error).split())[:60]}"
    return "yes"


def drafts(name: str, model: Any, prompt: Tensor, count: int) -> str:
    """How many of ``count`` tokens are the same with and without drafts."""
    greedy = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, past_key_values=make(name, model), **greedy)
    try:
        drafted = model.generate(prompt, past_key_values=make(name, model), prompt_lookup_num_tokens=10, **greedy)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:60]}"
    new = plain.shape[1] - prompt.shape[1]
    same = (plain == drafted)[0, prompt.shape[1] :].long().cumprod(0).sum()
    return "same tokens" if int(same) == new else f"parts after {int(same)} of {new} tokens"


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="plain text, long enough for the contexts")
    parser.add_argument("--context", type=int, nargs="+", default=[2048])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--drafted", type=int, default=200, help="tokens generated with and without drafts; 0: neither")
    parser.add_argument("--cache", nargs="+", choices=[*CACHES, "all"], default=["all"])
    options = parser.parse_args()
    loaded = load_model(options.model)
    model = loaded.model
    text = options.text.read_text(encoding="utf-8", errors="replace")[: 8 * max(options.context)]
    tokens = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    rows: list[Row] = []
    names = list(CACHES) if options.cache == ["all"] else options.cache
    able: dict[str, Row] = {name: {} for name in names}
    if options.drafted:
        for name in names:
            print(f"what {name} can do ...", file=sys.stderr)
            able[name] = {
                "sliding_windows": sliding_windows(name),
                "drafts": drafts(name, model, tokens[:, :300], options.drafted),
            }
    for context in options.context:
        exact: Tensor | None = None
        for name in names:
            cache = make(name, model)
            prompt, step, logs = decode(cache, model, tokens[:, : context + options.steps], context)
            exact = logs if exact is None else exact
            kl = float((exact.exp() * (exact - logs)).sum(-1).mean())
            row: Row = {"cache": name, "context": context, "prompt_s": prompt, "step_ms": 1e3 * step}
            row |= {"cache_MiB": nbytes(cache) / 2**20, "kl": kl}
            rows.append(row | able[name])
            print(rows[-1], file=sys.stderr)
            del cache
    figure = bars("Caches for transformers", rows, ("cache", "context"), "step_ms")
    facts = facts_of(options)
    publish("Caches for transformers", {"rows": rows}, facts, options.json, figure, picture=options.picture)


if __name__ == "__main__":
    main()
