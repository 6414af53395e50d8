"""``kvbits generate``: complete a prompt, or answer it as a chat message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile
from kvbits.cli.session import load, note, prompts_of
from kvbits.errors import RequestError

if TYPE_CHECKING:
    from kvbits.engine.outputs import Delta, RequestOutput


def generate(
    model: options.Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="May be repeated.")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A UTF-8 text file as prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the likeliest K tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may repeat.")] = None,
    kv_cache_dtype: options.KVCacheDtype = "int8",
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 512,
    speculative_config: options.Speculative = None,
    dtype: options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Generate text; it appears as it comes. Several prompts run together and are printed one after another."""
    results = JsonFile(json_file)
    kv_cache_dtype = options.cache_dtype(kv_cache_dtype, kv_policy)
    texts = prompts_of(prompt or [], prompt_file or [])
    from kvbits.engine.llm import LLM
    from kvbits.engine.params import SamplingParams
    from kvbits.engine.speculation import SpeculativeConfig

    speculative = SpeculativeConfig.of(speculative_config)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
    )
    llm = LLM(
        load(model, dtype, threads, weights, device, trust_remote_code, kv_cache_memory=kv_cache_memory),
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        speculative_config=speculative,
    )
    single = len(texts) == 1
    show = _stream if single else None
    if chat:
        chats = [[{"role": "user", "content": text}] for text in texts]
        outputs = llm.chat(chats, params, on_token=show, use_tqdm=not single)
    else:
        outputs = llm.generate(list(texts), params, on_token=show, use_tqdm=not single)
    for text, output in zip(texts, outputs, strict=True):
        if not single:
            print(f"=== {' '.join(text.split())[:60]}\n{output.outputs[0].text if not output.error else ''}")
        elif not output.error:
            print()
    found: dict[str, Any] = {"results": [_json(t, o) for t, o in zip(texts, outputs, strict=True)]}
    if llm.speculation is not None:
        note(llm.speculation.line())
        found["speculation"] = llm.speculation.as_json()
    results.write({"dtype": kv_cache_dtype, **found})
    failed = [output.error for output in outputs if output.error]
    if failed:
        raise RequestError(failed[0] if len(failed) == 1 else f"{len(failed)} prompts failed, the first: {failed[0]}")


def _stream(index: int, delta: Delta) -> None:
    sys.stdout.write(delta.text)
    sys.stdout.flush()


def _json(prompt: str, output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "error": output.error,
    }
