"""``kvbits cache save`` and ``kvbits cache load``: pages of a prompt as a file, from one machine to another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile, readable, writable
from kvbits.cli.session import load as load_model
from kvbits.cli.session import note, prompts_of
from kvbits.config import AUTO
from kvbits.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from kvbits.engine.transfer import PageBundle
    from kvbits.llm import LLM

app = typer.Typer(help="Save the computed pages of a prompt to a file, and load them.", no_args_is_help=True)

_BUNDLE = "a bundle of pages"

Prompt = Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")]
PromptFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A UTF-8 text file as prompt.")]


@app.command()
def save(
    model: options.Model,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="Where the pages go (safetensors).")],
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    kv_cache_dtype: options.KVCacheDtype = AUTO,
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    disable_mla: options.DisableMLA = False,
    dtype: options.Dtype = "bfloat16",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Compute a prompt and write its full pages, as they lie in the cache."""
    results = JsonFile(json_file)
    text = _only(prompt, prompt_file)
    writable(output)
    _check(model, kv_cache_dtype, kv_policy, kv_cache_memory, dtype)
    llm = _llm(model, kv_cache_dtype, kv_policy, kv_cache_memory, dtype, threads, trust_remote_code, disable_mla)
    seconds = _compute(llm, text)
    bundle = llm.save_cache(output, text)
    facts = _facts(bundle, output) | {"prefill_seconds": seconds}
    note(f"Computed in {seconds:.2f} s; {_line(facts)} in '{output}'")
    results.write(facts)


@app.command()
def load(
    model: options.Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'kvbits cache save' wrote.")],
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most new tokens of the answer to a prompt.")] = 128,
    compare: Annotated[bool, typer.Option("--compare", help="Also compute the same tokens, for the time.")] = False,
    kv_cache_dtype: options.KVCacheDtype = AUTO,
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    disable_mla: options.DisableMLA = False,
    dtype: options.Dtype = "bfloat16",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Check a file of pages and load it; with a prompt that begins with its text, answer that."""
    results = JsonFile(json_file)
    text = None if prompt is None and prompt_file is None else _only(prompt, prompt_file)
    _check(model, kv_cache_dtype, kv_policy, kv_cache_memory, dtype)
    readable(file)
    from kvbits.engine.transfer import PageBundle

    bundle = PageBundle.load(file)
    llm = _llm(model, kv_cache_dtype, kv_policy, kv_cache_memory, dtype, threads, trust_remote_code, disable_mla)
    begin = time.perf_counter()
    llm.load_cache(file)
    seconds = time.perf_counter() - begin
    facts: dict[str, Any] = _facts(bundle, file) | {"load_seconds": seconds}
    note(f"Loaded in {seconds:.3f} s: {_line(facts)}")
    if text is not None:
        facts["answer"] = _answer(llm, text, max_tokens)
    if compare:
        llm.engine.pages.clear_cache()
        facts["prefill_seconds"] = _compute(llm, bundle.tokens.tolist())
        note(f"Computing the same tokens took {facts['prefill_seconds']:.2f} s")
    results.write(facts)


def _only(prompt: str | None, file: Path | None) -> str:
    texts = prompts_of([] if prompt is None else [prompt], [] if file is None else [file])
    if len(texts) > 1:
        raise ConfigError("give --prompt or --prompt-file, not both")
    return texts[0]


def _check(model: str, kv_dtype: str, policy: Path | None, memory: str, dtype: str) -> None:
    from kvbits.engine.config import EngineConfig
    from kvbits.engine.precheck import check_engine, check_no_states

    config = EngineConfig.of(kv_cache_dtype=options.cache_dtype(kv_dtype, policy), kv_cache_memory=memory)
    check_no_states(check_engine(model, config, dtype=dtype), _BUNDLE)


def _llm(
    model: str,
    kv_dtype: str,
    policy: Path | None,
    memory: str,
    dtype: str,
    threads: int | None,
    trusted: bool,
    disable_mla: bool,
) -> LLM:
    from kvbits.llm import LLM

    llm = LLM(
        load_model(
            model,
            dtype,
            threads,
            trust_remote_code=trusted,
            disable_mla=disable_mla,
            check=lambda geometry, _: geometry.refuse_states(_BUNDLE),
        ),
        kv_cache_dtype=options.cache_dtype(kv_dtype, policy),
        kv_cache_memory=memory,
    )
    note(llm.choice.line)
    return llm


def _compute(llm: LLM, prompt: str | list[int]) -> float:
    """Seconds until the first token after ``prompt``."""
    from kvbits.engine.params import SamplingParams

    begin = time.perf_counter()
    output = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0))[0]
    if output.error:
        raise RequestError(output.error)
    return time.perf_counter() - begin


def _answer(llm: LLM, text: str, max_tokens: int) -> dict[str, Any]:
    from kvbits.engine.params import SamplingParams

    output = llm.generate(text, SamplingParams(max_tokens=max_tokens, temperature=0))[0]
    if output.error:
        raise RequestError(output.error)
    note(f"{output.num_cached_tokens} of the prompt's {len(output.prompt_token_ids)} tokens were loaded")
    print(output.outputs[0].text)
    return {"cached_tokens": output.num_cached_tokens, "text": output.outputs[0].text}


def _facts(bundle: PageBundle, path: Path) -> dict[str, Any]:
    return {
        "policy": bundle.identity["policy"],
        "tokens": bundle.num_tokens,
        "page_bytes": bundle.num_bytes,
        "file_bytes": path.stat().st_size,
    }


def _line(facts: dict[str, Any]) -> str:
    return f"{facts['tokens']} tokens as {facts['policy']}, {facts['page_bytes'] / 2**20:.2f} MiB"
