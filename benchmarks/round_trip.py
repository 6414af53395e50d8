"""What a model loses when blocks of its 16-bit cache leave an engine in a policy's bits and come back.

    python benchmarks/round_trip.py smollm2-135m --json out/round_trip.json

The cache of the first part of each window goes through the coder that LMCache's serializer and vLLM's tier use
(``trip``); the model, in float32, then reads the rest of the window. Beside it the same in a cache of kvbits' own,
which reads the first part from coded pages too and codes the rest (``own``). KL of the rest's distributions, to those
with a cache in bfloat16, in nats a token.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from report import facts_of, publish
from torch import Tensor
from transformers import DynamicCache

from kvbits.evaluation.documents import reference_text
from kvbits.hf import QuantizedCache
from kvbits.kernels.chunks import ChunkCoder
from kvbits.models import load_model
from kvbits.models.load import LoadedModel

PIECE = 128
"""Tokens whose distributions are in memory at once."""


def read(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Log-probabilities ``float32 [tokens, vocab]`` after each of ``tokens``, which ``cache`` takes in."""
    logits: Tensor = model(tokens[None], past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)


def divergences(model: Any, tokens: Tensor, reference: Any, caches: dict[str, Any]) -> dict[str, float]:
    """Of each cache to ``reference``, over ``tokens``."""
    found = dict.fromkeys(caches, 0.0)
    for piece in tokens.split(PIECE):
        p = read(model, piece, reference)
        for name, cache in caches.items():
            found[name] += float((p.exp() * (p - read(model, piece, cache))).sum())
    return {name: kl / len(tokens) for name, kl in found.items()}


def tripped(cache: DynamicCache, coder: ChunkCoder | None) -> DynamicCache:
    """``cache`` in bfloat16; with a ``coder`` there and back."""
    found = copy.deepcopy(cache)
    layers: list[Any] = found.layers
    chunk = torch.stack(
        [torch.stack([getattr(x, side)[0].transpose(0, 1) for x in layers]) for side in ("keys", "values")]
    )
    chunk = chunk.to(torch.bfloat16)
    if coder is not None:
        data = torch.empty(coder.size(chunk.shape[2]), dtype=torch.uint8)
        coder.encode([chunk], "m", data)
        coder.decode(data, "m", [chunk])
    for index, layer in enumerate(layers):
        for number, side in enumerate(("keys", "values")):
            setattr(layer, side, chunk[number, index].transpose(0, 1)[None].to(layer.keys.dtype).contiguous())
    return found


def after_a_trip(loaded: LoadedModel, first: Tensor, rest: Tensor, dtypes: Sequence[str]) -> dict[str, float]:
    model, layer = loaded.model, loaded.geometry.layers[0]
    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    model(first[None], past_key_values=cache, logits_to_keep=1)
    coders = {d: ChunkCoder(loaded.policy(d), layer.num_kv_heads, layer.key_dim) for d in dtypes}
    return divergences(model, rest, tripped(cache, None), {d: tripped(cache, coder) for d, coder in coders.items()})


def in_a_cache(loaded: LoadedModel, first: Tensor, rest: Tensor, dtypes: Sequence[str]) -> dict[str, float]:
    caches = {d: QuantizedCache(loaded.model, d, kv_cache_memory="256MiB") for d in ("bf16", *dtypes)}
    for cache in caches.values():
        loaded.model(first[None], past_key_values=cache, logits_to_keep=1)
    return divergences(loaded.model, rest, caches.pop("bf16"), caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["int8", "int4"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=1536, help="tokens that make the trip")
    parser.add_argument("--rest", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("out/round_trip.json"))
    args = parser.parse_args()
    loaded = load_model(args.model, dtype="float32")
    tokens = torch.tensor(
        loaded.tokenizer(reference_text()[: 12 * args.windows * (args.context + args.rest)])["input_ids"]
    )
    windows = tokens.split(args.context + args.rest)[: args.windows]
    ways: dict[str, Callable[..., dict[str, float]]] = {"trip": after_a_trip, "own": in_a_cache}
    sums = {dtype: dict.fromkeys(ways, 0.0) for dtype in args.kv_cache_dtype}
    for window in windows:
        for way, run in ways.items():
            with torch.inference_mode():
                found = run(loaded, *window.split([args.context, args.rest]), args.kv_cache_dtype)
            for dtype, kl in found.items():
                sums[dtype][way] += kl / len(windows)
                print(f"{dtype}, {way}: {kl:.6f}", flush=True)
    rows = [{"dtype": dtype, **kl, "ratio": kl["trip"] / kl["own"]} for dtype, kl in sums.items()]
    publish("A round trip in a policy's bits", {"rows": rows}, facts_of(args, "json"), args.json)


if __name__ == "__main__":
    main()
