"""What a request needs before the engine sees it: tokens, grammar, parameters.

Tokenizing and compiling take milliseconds to seconds, so they run in one thread beside the event loop; one, because
tokenizers are not made for several.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from kvbits.engine.grammar import Grammar, GrammarCompiler, json_rule
from kvbits.engine.text import decoder, encode, encode_chat
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


_NO_OPTIONS = {"add_generation_prompt", "messages", "tools", "tokenize", "chat_template", "split_special_tokens"}
"""What ``chat_template_kwargs`` must not set."""


class Preparer:
    """Tokenizer, chat template and grammar compiler of one model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._decode = decoder(loaded)
        self._thread = ThreadPoolExecutor(1, "kvbits-prepare")
        self._names: dict[int, bytes] = {}

    async def run(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the preparing thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def text_tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a plain prompt."""
        if add_special_tokens:
            return encode(self.loaded, text)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool], template: Mapping[str, Any], split: bool = True
    ) -> list[int]:
        """Token ids of a chat; ``split``: special tokens in its texts are text.

        Raises ``RequestError`` when the template refuses it or its options.
        """
        for name in template:
            if name in _NO_OPTIONS:
                raise RequestError(f"chat_template_kwargs must not set '{name}'")
        return self._chat_tokens(messages, tools, split, **template)

    def tokenize_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool], generation: bool, split: bool = True
    ) -> list[int]:
        """Token ids of a chat, with or without the start of an answer."""
        return self._chat_tokens(messages, tools, split, add_generation_prompt=generation)

    def _chat_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool], split: bool, **options: Any
    ) -> list[int]:
        known = plain_tools(tools)
        text = str(self._tokenizer.chat_template or "")
        plain = plain_messages(messages, known, text)
        if known and "tools" in text:
            options["tools"] = known
        return encode_chat(self.loaded, plain, split_special_tokens=split, **options)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, also where they are part of a character."""
        found = self._names.get(token)
        if found is None:
            try:
                found = self._compiler.token_bytes(token)
            except RequestError:
                found = self.decode([token]).encode("utf-8", "replace")
            self._names[token] = found
        return found

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

    @cached_property
    def _compiler(self) -> GrammarCompiler:
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
