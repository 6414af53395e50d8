"""``kvbits chat``: a conversation in the terminal, with a model in this process or behind a URL."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.keys import client_key
from kvbits.cli.remote import Remote
from kvbits.cli.session import load, note
from kvbits.errors import ConfigError, KVBitsError

if TYPE_CHECKING:
    from kvbits.engine.llm import LLM

Messages = list[dict[str, str]]


@dataclass
class Turn:
    """What an answer took: tokens, how many of the prompt's came from the cache, and bytes of the whole chat."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    cache_bytes: float = 0.0


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for generate; or --url of a server.")
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A server, in the place of MODEL.")] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="The server's key.")] = None,
    api_key_file: options.ApiKeyFile = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions for the model.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    split_special_tokens: Annotated[
        bool, typer.Option(help="Special tokens that you type, such as <|im_end|>, are text.")
    ] = True,
    kv_cache_dtype: options.KVCacheDtype = "int8",
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    dtype: options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Chat with a model; an empty line or the end of input ends it. Speed and the cache's bytes go to stderr."""
    if (model is None) == (url is None):
        raise ConfigError("give either a MODEL or --url")
    asker: _Local | _Remote
    if url is not None:
        asker = _Remote(Remote(url, client_key(api_key, api_key_file)), split_special_tokens)
    else:
        assert model is not None
        from kvbits.engine.llm import LLM

        dtype_name = options.cache_dtype(kv_cache_dtype, kv_policy)
        loaded = load(model, dtype, threads, weights, device, trust_remote_code, kv_cache_memory=kv_cache_memory)
        asker = _Local(
            LLM(loaded, kv_cache_dtype=dtype_name, kv_cache_memory=kv_cache_memory, progress=False),
            split_special_tokens,
        )
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        text = _line()
        if not text:
            return
        messages.append({"role": "user", "content": text})
        turn = Turn()
        begin = time.perf_counter()
        answer = ""
        try:
            for piece in asker.ask(messages, max_tokens, temperature, turn):
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KVBitsError as error:
            if not sys.stdin.isatty():
                raise
            note(f"kvbits: error: {error}")
        print()
        messages.append({"role": "assistant", "content": answer})
        seconds = time.perf_counter() - begin
        note(
            f"[{turn.new_tokens / seconds:.1f} tokens/s; {turn.cached_tokens:,} of {turn.prompt_tokens:,} prompt "
            f"tokens from the cache; this chat: {turn.cache_bytes / 2**20:.1f} MiB]"
        )


def _line() -> str:
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


class _Local:
    """A model in this process."""

    def __init__(self, llm: LLM, split: bool) -> None:
        self._llm = llm
        self._split = split

    def ask(self, messages: Messages, max_tokens: int, temperature: float, turn: Turn) -> Iterator[str]:
        from kvbits.engine.params import SamplingParams
        from kvbits.engine.text import encode_chat
        from kvbits.errors import RequestError

        engine = self._llm.engine
        prompt = encode_chat(self._llm.loaded, messages, split_special_tokens=self._split)
        request_id = engine.add_request(prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature))
        try:
            while engine.has_unfinished():
                for delta in engine.step():
                    if delta.error is not None:
                        raise RequestError(delta.error)
                    turn.prompt_tokens, turn.cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
                    turn.new_tokens += len(delta.token_ids)
                    yield delta.text
        finally:
            engine.abort(request_id)
        turn.cache_bytes = engine.pool.layout.session_bytes(turn.prompt_tokens + turn.new_tokens)


class _Remote:
    """A model behind a URL."""

    def __init__(self, remote: Remote, split: bool) -> None:
        self._remote = remote
        self._split = split
        self._model: dict[str, Any] = remote.get("/v1/models")["data"][0]

    def ask(self, messages: Messages, max_tokens: int, temperature: float, turn: Turn) -> Iterator[str]:
        body = {
            "model": self._model["id"],
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self._split:
            # Other servers do not know the field, and most take special tokens in texts for tokens anyway.
            body["split_special_tokens"] = False
        for event in self._remote.events("/v1/chat/completions", body):
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""
            usage = event.get("usage")
            if usage:
                turn.prompt_tokens, turn.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                turn.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                # Other servers do not say what a token costs them.
                per_token = self._model.get("kv_cache_bytes_per_token", 0.0)
                turn.cache_bytes = (turn.prompt_tokens + turn.new_tokens) * per_token
