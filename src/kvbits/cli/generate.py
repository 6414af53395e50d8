"""``kvbits generate``: complete a prompt, or answer it as a chat message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile
from kvbits.cli.session import load, note, prompts_of
from kvbits.config import AUTO
from kvbits.errors import RequestError

if TYPE_CHECKING:
    from kvbits.engine.outputs import Delta, RequestOutput

_COMPLETION, _ANSWER = 128, 512
"""Most new tokens."""


def generate(
    model: options.Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="May be repeated.")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A UTF-8 text file as prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most new tokens. Default: 128, or 512 with --chat.")
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    kv_cache_dtype: options.KVCacheDtype = AUTO,
    max_kl: options.MaxKL = None,
    text: options.MeasuredText = None,
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    state_dtype: options.StateDtype = AUTO,
    disable_mla: options.DisableMLA = False,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
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
    from kvbits.auto.wanted import Wanted
    from kvbits.engine.config import EngineConfig, step_tokens
    from kvbits.engine.params import SamplingParams
    from kvbits.engine.precheck import check_chat, check_engine, engine_check
    from kvbits.engine.speculation.config import SpeculativeConfig

    sampling: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed, "stop": stop,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    if max_tokens is None:
        max_tokens = _ANSWER if chat else _COMPLETION
    SamplingParams.of({}, max_tokens, **sampling)
    Wanted(kv_cache_dtype, max_kl, text)
    speculative = SpeculativeConfig.of(speculative_config)
    engine: dict[str, Any] = {
        "kv_cache_dtype": kv_cache_dtype, "kv_cache_memory": kv_cache_memory, "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs, "max_num_batched_tokens": step_tokens(max_num_batched_tokens, device),
        "state_dtype": state_dtype, "disable_mla": disable_mla,
    }  # fmt: skip
    config = EngineConfig.of(**engine)
    outline = check_engine(model, config, speculative, dtype=dtype, weights=weights, device=device)
    if chat:
        check_chat(outline)
    loaded = load(
        model, dtype, threads, weights, device, trust_remote_code, max_model_len=max_model_len,
        disable_mla=disable_mla, check=engine_check(config, speculative),
    )  # fmt: skip
    from kvbits.llm import LLM

    llm = LLM(loaded, max_kl=max_kl, text=text, speculative_config=speculative, **engine)
    note(llm.choice.line)
    params = SamplingParams.of(llm.loaded.sampling_defaults, max_tokens, **sampling)
    single = len(texts) == 1
    show = _stream if single else None
    if chat:
        chats = [[{"role": "user", "content": asked}] for asked in texts]
        outputs = llm.chat(chats, params, on_token=show, use_tqdm=not single)
    else:
        outputs = llm.generate(list(texts), params, on_token=show, use_tqdm=not single)
    for asked, output in zip(texts, outputs, strict=True):
        if not single:
            print(f"=== {' '.join(asked.split())[:60]}\n{output.outputs[0].text if not output.error else ''}")
        elif not output.error:
            print()
        if output.outputs[0].finish_reason == "length" and not output.error:
            note(f"[cut by --max-tokens, {max_tokens}]" if output.outputs[0].note is None else output.outputs[0].note)
    found: dict[str, Any] = {"results": [_json(t, o) for t, o in zip(texts, outputs, strict=True)]}
    if llm.speculation is not None:
        note(llm.speculation.line())
        found["speculation"] = llm.speculation.as_json()
    loss = llm.choice.loss
    results.write({"dtype": llm.choice.policy.label, "loss": None if loss is None else loss.as_json(), **found})
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
