"""What a request needs before the engine sees it: tokens of its prompt, and what turns the answer's into text.

Tokenizing and compiling take milliseconds to seconds, so they run in threads beside the event loop. Small requests have
threads of their own and do not wait behind large ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvbits.engine.detokenize import Kind
from kvbits.engine.encode import Encoder
from kvbits.engine.limits import RequestLimits
from kvbits.engine.text import Decoders, chat_text
from kvbits.errors import ContextLengthError, RequestError
from kvbits.models import LoadedModel
from kvbits.server.grammars import Grammars
from kvbits.server.messages import plain_messages, plain_tools
from kvbits.server.protocol.base import SamplingFields
from kvbits.server.protocol.chat import ChatFields, ChatRequest, Message, Tool
from kvbits.server.protocol.completion import CompletionRequest, TokenizeRequest
from kvbits.server.protocol.limits import MAX_TOKENIZED
from kvbits.server.templates import ChatTemplate
from kvbits.server.tools import CallParser

T = TypeVar("T")

_THREADS = 4
"""For small requests, and as many for large ones."""

_NO_OPTIONS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "messages", "split_special_tokens", "tokenize",
    "tools",
}  # fmt: skip
"""What ``chat_template_kwargs`` must not set."""

_THOUGHT = {"enable_thinking", "thinking"}
"""Names of templates that let a model think; where a template reads none, without thoughts is what it does."""


class _Bounded(RequestLimits):
    """Of texts that are tokenized and need not fit the context."""

    def _too_long(self, found: str, param: str | None = None) -> None:
        raise ContextLengthError(f"at most {self.context} tokens are counted; {found}", param)


class Preparer:
    """Tokenizer, chat template and grammar compiler of one model."""

    def __init__(self, loaded: LoadedModel, limits: RequestLimits) -> None:
        self.loaded = loaded
        self.encoder = Encoder(loaded, limits)
        most = max(MAX_TOKENIZED, limits.context)
        self._most = _Bounded(limits.vocab, most, most, limits.memory)
        self.bounded = Encoder(loaded, self._most)
        self.template = ChatTemplate(loaded)
        self._limits = limits
        self._decoders = Decoders(loaded)
        self._decode = self._decoders.showing()
        self._small = ThreadPoolExecutor(_THREADS, "kvbits-prepare")
        self._large = ThreadPoolExecutor(_THREADS, "kvbits-prepare-large")
        self.grammars = Grammars(loaded, self.template)
        self._names: dict[int, bytes] = {}

    async def run(self, function: Callable[[], T], large: bool) -> T:
        """Run ``function`` in one of the threads."""
        threads = self._large if large else self._small
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    def close(self) -> None:
        """End the threads."""
        for threads in (self._small, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    def chat_tokens(self, request: ChatRequest, tools: Sequence[Tool]) -> list[int]:
        """Token ids of a chat whose template gets ``tools``.

        Raises ``RequestError`` when the template refuses it or its options, or when it is too long.
        """
        rendered = self._rendered(request.messages, tools, request, self._effort(request.reasoning_effort))
        split = request.split_special_tokens
        if request.truncate_prompt_tokens is None:
            return self.encoder.chat(rendered, split)
        self.bounded.check_chat(rendered, split)
        return self.truncated(self.encoder.chat_ids(rendered, split), request)

    def tokenize_chat(self, request: TokenizeRequest) -> list[int]:
        """Token ids of a chat, which may be longer than the context."""
        rendered = self._rendered(request.messages or [], request.tools or [], request, {})
        return self._counted(self.bounded.chat(rendered, request.split_special_tokens))

    def tokenize_text(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, which may be longer than the context."""
        return self._counted(self.bounded.prompt(text, add_special_tokens))

    def _counted(self, tokens: list[int]) -> list[int]:
        self._most.check_size(len(tokens))
        return tokens

    def prompt_tokens(self, prompt: str, request: CompletionRequest) -> list[int]:
        """Token ids of a text, cut as ``request`` says. Raises ``RequestError`` for one that is too long."""
        if request.truncate_prompt_tokens is None:
            return self.encoder.prompt(prompt, request.add_special_tokens)
        return self.truncated(self.bounded.prompt(prompt, request.add_special_tokens), request)

    def truncated(self, tokens: list[int], request: SamplingFields) -> list[int]:
        """The last of ``tokens``, or the first, that ``request`` wants; with -1 as many as the context holds."""
        most = request.truncate_prompt_tokens
        if most is None:
            return tokens
        context = min(self._limits.context, self._limits.pool)
        if most > context:
            raise RequestError(
                f"truncate_prompt_tokens is {most}; this model's maximum context length is {context} tokens",
                "truncate_prompt_tokens",
            )
        # One token is left for the answer.
        most = context - 1 if most < 0 else most
        return tokens[:most] if request.truncation_side == "right" else tokens[max(0, len(tokens) - most) :]

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Tool], fields: ChatFields, options: Mapping[str, Any]
    ) -> str:
        given = fields.chat_template_kwargs or {}
        for name, value in given.items():
            if name in _NO_OPTIONS:
                raise RequestError(f"chat_template_kwargs must not set '{name}'", f"chat_template_kwargs.{name}")
            if not self.template.knows(name) and not (name in _THOUGHT and value is False):
                words = f"the chat template of {self.loaded.name} does not read '{name[:80]}'"
                raise RequestError(words, f"chat_template_kwargs.{name[:80]}")
        options = {**options, **given, "add_generation_prompt": fields.add_generation_prompt}
        if fields.continue_final_message:
            if not messages or not messages[-1].content:
                raise RequestError("continue_final_message needs a last message with text", "continue_final_message")
            options["continue_final_message"] = True
        known = plain_tools(tools)
        shown = self.template.tools(known)
        if shown:
            options["tools"] = shown
        plain = self.template.fit(plain_messages(messages), known)
        return chat_text(self.loaded, plain, split_special_tokens=fields.split_special_tokens, **options)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """The template's options for an effort of reasoning."""
        if effort is None:
            return {}
        found: dict[str, Any] = {"reasoning_effort": effort} if self.template.knows("reasoning_effort") else {}
        if self.template.knows("enable_thinking"):
            found["enable_thinking"] = effort != "none"
        if not found and effort != "none":
            words = f"the chat template of {self.loaded.name} knows no effort of reasoning"
            raise RequestError(f"reasoning_effort is not supported: {words}", "reasoning_effort")
        return found

    def call_parser(self, names: Sequence[str], forced: bool) -> CallParser:
        """What finds calls in an answer."""
        return CallParser(self.template.format, names, forced=forced, short_ids=self.template.short_ids)

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
            return self.grammars.compiler.token_bytes(token)
        except RequestError:
            return self.decode([token]).encode("utf-8", "replace")

    @property
    def _tokenizer(self) -> Any:
        if self.loaded.tokenizer is None:
            raise RequestError(f"{self.loaded.name} has no tokenizer; give prompts as token ids")
        return self.loaded.tokenizer
