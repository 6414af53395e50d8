"""``kvbits chat``: a conversation in the terminal, with a model in this process or behind a URL."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.asker import FromServer, Local, Turn
from kvbits.cli.conversation import Conversation
from kvbits.cli.keys import client_key
from kvbits.cli.lines import read_message
from kvbits.cli.remote import Remote
from kvbits.cli.session import load, note
from kvbits.config import AUTO
from kvbits.errors import ConfigError, KVBitsError


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for generate; or --url of a server.")
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A server, in the place of MODEL.")] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="The server's key.")] = None,
    api_key_file: options.ApiKeyFile = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions for the model.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")] = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    split_special_tokens: Annotated[
        bool, typer.Option(help="Special tokens that you type, such as <|im_end|>, are text.")
    ] = True,
    kv_cache_dtype: options.KVCacheDtype = AUTO,
    max_kl: options.MaxKL = None,
    text: options.MeasuredText = None,
    kv_policy: options.KVPolicy = None,
    kv_cache_memory: options.KVCacheMemory = "1GiB",
    state_dtype: options.StateDtype = AUTO,
    disable_mla: options.DisableMLA = False,
    dtype: options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Chat with a model.

    /help lists commands; the end of input ends the chat, Ctrl-C an answer. Speed and the cache's bytes go to stderr.
    """
    if (model is None) == (url is None):
        raise ConfigError("give either a MODEL or --url")
    from kvbits.engine.params import SamplingParams

    sampling: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed, "stop": stop,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    SamplingParams.of({}, max_tokens, **sampling)
    asker: Local | FromServer
    if url is not None:
        asker = FromServer(Remote(url, client_key(api_key, api_key_file)), split_special_tokens, max_tokens, sampling)
    else:
        assert model is not None
        from kvbits.auto.wanted import Wanted
        from kvbits.engine.config import EngineConfig
        from kvbits.engine.precheck import check_chat, check_engine, engine_check

        dtype_name = options.cache_dtype(kv_cache_dtype, kv_policy)
        Wanted(dtype_name, max_kl, text)
        engine: dict[str, Any] = {
            "kv_cache_dtype": dtype_name, "kv_cache_memory": kv_cache_memory, "state_dtype": state_dtype,
            "disable_mla": disable_mla,
        }  # fmt: skip
        config = EngineConfig.of(**engine)
        check_chat(check_engine(model, config, dtype=dtype, weights=weights, device=device))
        loaded = load(
            model, dtype, threads, weights, device, trust_remote_code, disable_mla=disable_mla,
            check=engine_check(config),
        )  # fmt: skip
        from kvbits.llm import LLM

        llm = LLM(loaded, max_kl=max_kl, text=text, **engine)
        note(llm.choice.line)
        asker = Local(llm, split_special_tokens, max_tokens, sampling)
    conversation = Conversation(system, note)
    if sys.stdin.isatty():
        note("/help lists commands; Ctrl-C ends an answer, Ctrl-D the chat")
    while not conversation.ended:
        try:
            said = read_message()
        except KeyboardInterrupt:  # the line is dropped, as in a shell
            note("")
            continue
        if said is None:
            return
        try:
            if said and not conversation.command(said):
                _answer(conversation, said.removeprefix("/") if said.startswith("//") else said, asker)
        except KVBitsError as error:
            if not sys.stdin.isatty():
                raise
            note(f"kvbits: error: {error}")


def _answer(conversation: Conversation, text: str, asker: Local | FromServer) -> None:
    """Ask, show, and keep both messages; of a turn that fails neither stays."""
    turn, answer, interrupted = Turn(), "", False
    asked = [*conversation.messages, {"role": "user", "content": text}]
    begin = first = time.perf_counter()
    try:
        for piece in asker.ask(asked, turn):
            if not answer and piece:
                first = time.perf_counter()
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        interrupted = True
    finally:
        if answer:
            print()
    if answer:
        conversation.messages = [*asked, {"role": "assistant", "content": answer}]
    note(_figures(turn, first - begin, time.perf_counter() - first, interrupted))


def _figures(turn: Turn, waited: float, seconds: float, interrupted: bool) -> str:
    """Speed is that of decoding: what comes after the first token, which the prompt's time belongs to."""
    parts = [f"{(turn.new_tokens - 1) / seconds:.1f} tokens/s"] if turn.new_tokens > 1 and seconds > 0 else []
    parts += [
        f"first token after {waited:.2f} s",
        f"{turn.cached_tokens:,} of {turn.prompt_tokens:,} prompt tokens from the cache",
        f"this chat: {turn.cache_bytes / 2**20:.1f} MiB",
    ]
    if interrupted:
        parts.append("interrupted")
    elif turn.finish == "length":
        parts.append("cut by --max-tokens")
    return f"[{'; '.join(parts)}]"
