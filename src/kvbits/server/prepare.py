"""What a request needs before the engine sees it: tokens, grammar, parameters.

Tokenizing and compiling take milliseconds to seconds, so they run in threads beside the event loop. Small requests have
threads of their own and do not wait behind large ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from kvbits.engine.detokenize import Kind
from kvbits.engine.encode import Encoder
from kvbits.engine.grammar import Grammar, GrammarCompiler, json_rule
from kvbits.engine.limits import RequestLimits
from kvbits.engine.text import chat_text, decoder
from kvbits.errors import RequestError
from kvbits.models import LoadedModel
from kvbits.server.messages import plain_messages, plain_tools
from kvbits.server.protocol.chat import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedTool,
    ResponseFormat,
    Tool,
)
from kvbits.server.protocol.limits import MAX_GRAMMAR
from kvbits.server.tools import call_rules

T = TypeVar("T")

_THREADS = 4
"""For small requests, and as many for large ones."""

_NO_OPTIONS = {"add_generation_prompt", "messages", "tools", "tokenize", "chat_template", "split_special_tokens"}
"""What ``chat_template_kwargs`` must not set."""


class Preparer:
    """Tokenizer, chat template and grammar compiler of one model."""

    def __init__(self, loaded: LoadedModel, limits: RequestLimits) -> None:
        self.loaded = loaded
        self.encoder = Encoder(loaded, limits)
        self._decode = decoder(loaded)
        self._small = ThreadPoolExecutor(_THREADS, "kvbits-prepare")
        self._large = ThreadPoolExecutor(_THREADS, "kvbits-prepare-large")
        self._building = threading.Lock()
        self._names: dict[int, bytes] = {}

    async def run(self, function: Callable[[], T], large: bool) -> T:
        """Run ``function`` in one of the threads."""
        threads = self._large if large else self._small
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    def close(self) -> None:
        """End the threads."""
        for threads in (self._small, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    def chat_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool], template: Mapping[str, Any], split: bool = True
    ) -> list[int]:
        """Token ids of a chat; ``split``: special tokens in its texts are text.

        Raises ``RequestError`` when the template refuses it or its options, or when it is too long.
        """
        for name in template:
            if name in _NO_OPTIONS:
                raise RequestError(f"chat_template_kwargs must not set '{name}'")
        return self.encoder.chat(self._chat_text(messages, tools, split, **template), split)

    def tokenize_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool], generation: bool, split: bool = True
    ) -> list[int]:
        """Token ids of a chat, with or without the start of an answer."""
        text = self._chat_text(messages, tools, split, add_generation_prompt=generation)
        return self.encoder.chat_ids(text, split)

    def _chat_text(self, messages: Sequence[Message], tools: Sequence[Tool], split: bool, **options: Any) -> str:
        known = plain_tools(tools)
        text = str(self._tokenizer.chat_template or "")
        plain = plain_messages(messages, known, text)
        if known and "tools" in text:
            options["tools"] = known
        return chat_text(self.loaded, plain, split_special_tokens=split, **options)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        tokenizer = self._tokenizer
        if tokenizer.is_fast and not tokenizer.clean_up_tokenization_spaces:
            # The call for a batch lets other threads run, the one for a text does not.
            return str(tokenizer.backend_tokenizer.decode_batch([list(tokens)], skip_special_tokens=False)[0])
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, also where they are part of a character."""
        found = self._names.get(token)
        if found is None:
            found = self._names[token] = self._token_bytes(token)
        return found

    def hidden(self, token: int) -> bool:
        """Whether a generated text does not show ``token``: it is special."""
        return self._decode.look(token)[0] is Kind.SKIPPED

    def _token_bytes(self, token: int) -> bytes:
        found = None if self.hidden(token) else self._decode.bytes(token)
        if found is not None:
            return found
        try:
            return self._compiler.token_bytes(token)
        except RequestError:
            return self.decode([token]).encode("utf-8", "replace")

    def format_grammar(self, wanted: ResponseFormat | None) -> Grammar | None:
        """The grammar of a response format."""
        rule = format_rule(wanted)
        return None if rule is None else self._grammar(f"start: {rule}")

    def chat_grammar(self, request: ChatRequest) -> Grammar | None:
        """The grammar of a response format and a tool choice together."""
        rule = format_rule(request.response_format)
        tools, forced = chosen_tools(request)
        if not tools or (not forced and rule is None):
            return self.format_grammar(request.response_format)
        # A call or, where none is demanded, an answer in the wanted format.
        start = "start: calls" if forced else "start: calls | answer"
        rules = [start, call_rules(tools, request.parallel_tool_calls is not False)]
        if not forced:
            rules.append(f"answer: {rule}")
        return self._grammar("\n".join(rules))

    def _grammar(self, text: str) -> Grammar:
        if len(text) > MAX_GRAMMAR:
            raise RequestError(f"the schemas take {len(text):,} characters; at most {MAX_GRAMMAR:,} are allowed")
        grammar = self._compiler.lark(text)
        # Some grammars compile though no answer can follow them, a schema that is only a reference to itself for one.
        grammar.start().allowed()
        return grammar

    @property
    def _compiler(self) -> GrammarCompiler:
        with self._building:
            return self._only_compiler

    @cached_property
    def _only_compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.loaded)

    @property
    def _tokenizer(self) -> Any:
        if self.loaded.tokenizer is None:
            raise RequestError(f"{self.loaded.name} has no tokenizer; give prompts as token ids")
        return self.loaded.tokenizer


def format_rule(wanted: ResponseFormat | None) -> str | None:
    """The right side of a Lark rule for a response format; ``None``: anything goes."""
    if isinstance(wanted, JsonObjectFormat):
        return json_rule({"type": "object"})
    if isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.schema_
        return json_rule({"type": "object"} if schema is None else schema)
    return None


def chosen_tools(request: ChatRequest) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be. Raises ``RequestError`` for a choice that is none."""
    tools, choice = request.tools or [], request.tool_choice
    if choice in (None, "auto"):
        return tools, False
    if choice == "none":
        return [], False
    if not tools:
        raise RequestError("tool_choice demands a call, but tools is empty")
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            names = ", ".join(tool.function.name for tool in tools)
            raise RequestError(f"tool_choice names '{choice.function.name}'; the tools are {names}")
        return named[:1], True
    return tools, True
