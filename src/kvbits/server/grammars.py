"""What an answer must be: from response formats, structured outputs and tools to grammars."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from pydantic_core import from_json

from kvbits.engine.grammar import SAME_LINE, Grammar, GrammarCompiler, json_rule
from kvbits.errors import RequestError
from kvbits.models import LoadedModel
from kvbits.server.callformat import CallFormat, call_rules
from kvbits.server.protocol.base import StructuredOutputs
from kvbits.server.protocol.chat import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    TextFormat,
    Tool,
)
from kvbits.server.protocol.limits import MAX_GRAMMAR
from kvbits.server.templates import ChatTemplate

T = TypeVar("T")


class Grammars:
    """The grammars of one model; ``template`` says how it writes calls."""

    def __init__(self, loaded: LoadedModel, template: ChatTemplate) -> None:
        self._loaded = loaded
        self._template = template
        self._building = threading.Lock()

    def of_format(self, wanted: ResponseFormat | None, structured: StructuredOutputs | None = None) -> Grammar | None:
        """The grammar of a response format, or of structured outputs."""
        if structured is not None:
            if wanted is not None and not isinstance(wanted, TextFormat):
                raise RequestError("response_format and structured_outputs exclude each other", "structured_outputs")
            return _checked("structured_outputs", lambda: self._structured(structured))
        rule = _checked("response_format", lambda: format_rule(wanted))
        return None if rule is None else _checked("response_format", lambda: self._grammar(f"start: {rule}"))

    def of_chat(self, request: ChatRequest) -> Grammar | None:
        """The grammar of a response format and a tool choice together."""
        tools, forced = chosen_tools(request)
        strict = any(tool.function.strict for tool in tools)
        rule = _checked("response_format", lambda: format_rule(request.response_format))
        if not tools or not (forced or strict or rule is not None):
            return self.of_format(request.response_format, request.structured_outputs)
        if request.structured_outputs is not None:
            words = "structured_outputs goes with no tools that are forced or strict"
            raise RequestError(words, "structured_outputs")
        return _checked("tools", lambda: self._call_grammar(request, tools, forced, rule))

    def _call_grammar(self, request: ChatRequest, tools: Sequence[Tool], forced: bool, rule: str | None) -> Grammar:
        form = self._template.format
        rules = [(tool.function.name, arguments_rule(tool, forced)) for tool in tools]
        lines = [call_rules(form, rules, several_calls(request), self.compiler.literal)]
        if forced:
            lines.insert(0, "start: calls")
        elif rule is not None:
            # A call or, where none is demanded, an answer in the wanted format.
            lines = ["start: calls | answer", f"answer: {rule}", *lines]
        else:
            lines = [*self._free_rules(form), *lines]
        return self._grammar("\n".join(lines))

    def _free_rules(self, form: CallFormat) -> list[str]:
        """Rules of a text in which calls may come: what begins one is never part of the text."""
        if not form.begin:
            return ["start: calls | TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
        if self.compiler.marks(form.begin):
            return ["start: TEXT calls?", r"TEXT: /(.|\n)*/"]
        return ["start: TEXT | open calls", f"open[suffix={json.dumps(form.begin)}]: TEXT", r"TEXT: /(.|\n)*/"]

    def _structured(self, wanted: StructuredOutputs) -> Grammar:
        compiler = self.compiler
        if wanted.regex is not None:
            return self._checked_grammar(wanted.regex, compiler.regex)
        if wanted.grammar is not None:
            return self._checked_grammar(wanted.grammar, compiler.ebnf)
        if wanted.choice is not None:
            _sized("".join(wanted.choice))
            return compiler.choice(wanted.choice)
        schema: Any = {"type": "object"} if wanted.json_ is None else wanted.json_
        if isinstance(schema, str):
            try:
                schema = from_json(_sized(schema), allow_inf_nan=False)
            except ValueError as error:
                raise RequestError(f"structured_outputs.json is not JSON: {error}") from error
        return self._grammar(f"start: {json_rule(schema)}")

    def _grammar(self, text: str) -> Grammar:
        return self._checked_grammar(text, self.compiler.lark)

    def _checked_grammar(self, text: str, compile_it: Callable[[str], Grammar]) -> Grammar:
        grammar = compile_it(_sized(text))
        # Some grammars compile though no answer can follow them, a schema that is only a reference to itself for one.
        grammar.start().allowed()
        return grammar

    @property
    def compiler(self) -> GrammarCompiler:
        """The model's compiler, which takes a second to make."""
        with self._building:
            return self._only_compiler

    @cached_property
    def _only_compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self._loaded)


def _sized(text: str) -> str:
    if len(text) > MAX_GRAMMAR:
        raise RequestError(f"the schemas take {len(text):,} characters; at most {MAX_GRAMMAR:,} are allowed")
    return text


def _checked(param: str, function: Callable[[], T]) -> T:
    """The result of ``function``, whose errors are of the field ``param``."""
    try:
        return function()
    except RequestError as error:
        error.param = error.param or param
        raise


def format_rule(wanted: ResponseFormat | None) -> str | None:
    """The right side of a Lark rule for a response format; ``None``: anything goes."""
    if isinstance(wanted, JsonObjectFormat):
        return json_rule({"type": "object"})
    if isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.schema_
        return json_rule({"type": "object"} if schema is None else schema)
    return None


def arguments_rule(tool: Tool, forced: bool) -> str:
    """The right side of a Lark rule for a call's arguments; free ones of a tool that is neither strict nor forced."""
    given = tool.function.parameters if forced or tool.function.strict else {"type": "object"}
    if given is None:
        given = {"properties": {}, "additionalProperties": False}
    return json_rule({"type": "object", **given}, SAME_LINE)


def several_calls(request: ChatRequest) -> bool:
    """Whether an answer may call more than once: a function that is named is called exactly once."""
    return request.parallel_tool_calls is not False and not isinstance(request.tool_choice, NamedTool)


def chosen_tools(request: ChatRequest) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be. Raises ``RequestError`` for a choice that is none."""
    tools, choice = request.tools or [], request.tool_choice
    if choice in (None, "auto"):
        return tools, False
    if choice == "none":
        return [], False
    if not tools:
        raise RequestError("tool_choice demands a call, but tools is empty", "tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            names = ", ".join(tool.function.name for tool in tools)
            raise RequestError(f"tool_choice names '{choice.function.name}'; the tools are {names}", "tool_choice")
        return named[:1], True
    return tools, True
