"""Chat templates of the usual kinds, and how calls are written in each: asked for, forced, read, sent back."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import byte_model, byte_tokenizer
from tokenizers import AddedToken

from kvbits import LLM, SamplingParams
from kvbits.engine.grammar import GrammarCompiler
from kvbits.engine.limits import RequestLimits
from kvbits.engine.text import chat_text
from kvbits.models import LoadedModel
from kvbits.server.messages import plain_messages, plain_tools
from kvbits.server.prepare import Preparer
from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.templates import ChatTemplate
from kvbits.server.tools import CallParser

LONG = "call_0123456789abcdef0123456"
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}}}  # fmt: skip
TIME = {"type": "function", "function": {"name": "get_time", "description": "now"}}
HEAD = "{% for m in messages %}{{ '[' + m.role + ']' }}"
TAIL = "{{ m.content or '' }}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
ARGUMENTS = "{{ c.function.arguments | tojson }}"
CALLS = "{% for c in m.tool_calls or [] %}"
END = "{% endfor %}"

TEMPLATES = {
    "none": HEAD + TAIL,
    "hermes": TOOLS + HEAD + CALLS + "{{ '<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}"
    + ARGUMENTS + "{{ '}\n</tool_call>\n' if not loop.last else '}\n</tool_call>' }}"
    + END + TAIL,
    "llama": TOOLS + HEAD + "{% if (m.tool_calls or []) | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    + CALLS + "{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' }}" + ARGUMENTS + "{{ '}' }}" + END + TAIL,
    "mistral": TOOLS + HEAD + "{% if m.tool_calls %}{{ '[TOOL_CALLS][' }}" + CALLS
    + "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    "{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}" + ARGUMENTS
    + "{{ ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last else ']' }}" + END + "{% endif %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}" + TAIL,
    "mistral-named": TOOLS + HEAD + CALLS + "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}" + ARGUMENTS
    + END + TAIL,
    "sections": TOOLS + HEAD + "{% if m.tool_calls %}{{ '<|a_list|>' }}" + CALLS
    + "{{ '<|one|>' + c.function.name + '\n```json\n' }}" + ARGUMENTS + "{{ '\n```<|one_ends|>' }}" + END
    + "{{ '<|a_list_ends|>' }}{% endif %}" + TAIL,
    "text-arguments": TOOLS + HEAD + CALLS + "{{ '<function=' + c.function.name + '>' + c.function.arguments }}"
    "{{ '</function>' }}" + END + TAIL,
    "no-system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{% endif %}{% endfor %}" + HEAD + TAIL,
    "descriptions": "{% for t in tools or [] %}{{ t.function.name + t.function.description }}{% endfor %}"
    + HEAD + CALLS + "{{ '<tool_call>{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}" + ARGUMENTS
    + "{{ '}</tool_call>' }}" + END + TAIL,
}  # fmt: skip
MARKS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|a_list|>",
    "<|one|>",
    "<|one_ends|>",
    "<|a_list_ends|>",
)


def loaded_with(template: str, marks: bool | None = None) -> LoadedModel:
    """The byte model with a template; ``marks``: those of calls are tokens of its vocabulary, special ones or not."""
    loaded = byte_model(vocab_size=259 + len(MARKS))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if marks is not None:
        tokenizer.add_tokens([AddedToken(mark, special=marks, normalized=False) for mark in MARKS])
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def talk() -> list[dict[str, Any]]:
    calls = [{"id": f"{LONG}{i}", "type": "function", "function": {"name": name, "arguments": text}}
             for i, (name, text) in enumerate([("get_weather", '{"city": "Rome"}'), ("get_time", "")])]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": f"{LONG}{i}", "content": f"result {i}"} for i in range(2)]
    return [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "first question"},
        {"role": "assistant", "content": None, "tool_calls": calls}, *results,
        {"role": "assistant", "content": "an answer"}, {"role": "user", "content": "second question"},
    ]  # fmt: skip


def rendered(template: ChatTemplate, loaded: LoadedModel) -> str:
    body = ChatRequest.model_validate({"messages": talk(), "tools": [WEATHER, TIME]})
    tools = plain_tools(body.tools or [])
    options: dict[str, Any] = {"tools": template.tools(tools)} if template.takes_tools else {}
    return chat_text(loaded, template.fit(plain_messages(body.messages), tools), **options)


def check_rendered(text: str) -> None:
    for part in ("be kind", "get_weather", "get_time", "Rome", "result 0", "result 1", "an answer"):
        assert part in text
    places = [text.rindex(p) for p in ("first question", "result 0", "result 1", "an answer", "second question")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_tools_calls_and_results_reach_every_template(name: str) -> None:
    loaded = loaded_with(TEMPLATES[name])
    check_rendered(rendered(ChatTemplate(loaded), loaded))


def test_what_a_template_cannot_do_is_found() -> None:
    found = {name: ChatTemplate(loaded_with(text)) for name, text in TEMPLATES.items()}
    assert {name for name, t in found.items() if not t.takes_system} == {"no-system"}
    assert {name for name, t in found.items() if not t.takes_tools} == {"none", "no-system"}
    assert {name for name, t in found.items() if t.needs_descriptions} == {"descriptions"}
    assert {name for name, t in found.items() if t.short_ids} == {"mistral"}
    assert {name for name, t in found.items() if t.arguments_as_text} == {"text-arguments"}
    assert not found["llama"].takes_several
    assert found["mistral"].takes_several


def test_ids_fit_the_family_and_tell_calls_and_results_apart() -> None:
    loaded = loaded_with(TEMPLATES["mistral"])
    text = rendered(ChatTemplate(loaded), loaded)
    ids = [part.split('"')[0] for part in text.split('"id": "')[1:]]
    assert len(set(ids)) == 2
    assert all(len(name) == 9 and name.isalnum() for name in ids)
    for place, name in enumerate(ids):
        assert f"[tool]{name}result {place}" in text


def test_results_of_one_turn_are_one_turn_of_the_user() -> None:
    loaded = loaded_with(TEMPLATES["no-system"])
    text = rendered(ChatTemplate(loaded), loaded)
    assert text.count("[user]") == 3
    assert text.index("be kind") < text.index("<tools>") < text.index("first question")


KINDS = [(name, None) for name in TEMPLATES]
KINDS += [(name, special) for name in ("hermes", "mistral-named", "sections") for special in (False, True)]


@pytest.mark.parametrize(("name", "marks"), KINDS)
def test_a_forced_call_is_a_call(name: str, marks: bool | None) -> None:
    """Whatever the model: these are random weights. Marks may be text, tokens of the vocabulary, or special ones."""
    loaded = loaded_with(TEMPLATES[name], marks)
    preparer = Preparer(loaded, RequestLimits(loaded.geometry.vocab_size, 1024, 1024, 1 << 22))
    llm = LLM(loaded, kv_cache_dtype="int8", kv_cache_memory="4MiB", progress=False)
    asks: list[dict[str, Any]] = [
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        {"tool_choice": "required", "parallel_tool_calls": False},
    ]  # fmt: skip
    for seed, fields in enumerate(asks):
        # Of any object of arguments random weights would write a very long one.
        tools = [WEATHER] if seed == 0 else [WEATHER, {"type": "function", "function": {"name": "stop"}}]
        body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools, **fields})
        params = SamplingParams(
            max_tokens=200, seed=seed, grammar=preparer.grammars.of_chat(body), visible_tokens=preparer.template.marks
        )
        output = llm.generate("say:", params)[0].outputs[0]
        assert output.finish_reason == "stop", output.text
        parser = preparer.call_parser(["get_weather", "stop"], forced=True)
        said, calls = parser.push(output.text)
        rest, more = parser.flush()
        assert (said + rest).strip() == ""
        found = [*calls, *more]
        assert len(found) == 1
        for call in found:
            assert call.name in ("get_weather", "stop")
            arguments = json.loads(call.arguments)
            assert arguments == {} if call.name == "stop" else arguments["city"] in ("Rome", "Oslo")
            assert not preparer.template.short_ids or len(call.id) == 9


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_writes_is_read_however_it_is_cut(name: str) -> None:
    """The template is the judge of the format: the answer that it shows is what a model trained with it writes."""
    loaded = loaded_with(TEMPLATES[name])
    template = ChatTemplate(loaded)
    if template.arguments_as_text is None:
        pytest.skip("it shows no calls")
    messages = [{"role": "user", "content": "q"}]
    calls = [{"id": f"abcdefgh{i}", "name": "get_weather", "arguments": {"city": city}}
             for i, city in enumerate(["Rome", "a \"b\" }\n</x>"][: 1 + template.takes_several])]  # fmt: skip
    start = chat_text(loaded, template.fit(messages, []))
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    whole = chat_text(loaded, template.fit([*messages, answer], []), add_generation_prompt=False)
    text = whole.removeprefix(start).partition("</s>")[0]
    for seed in range(20):
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4)) if seed else []
        parser = CallParser(template.format, ["get_weather"], short_ids=template.short_ids)
        said, found = "", []
        for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
            more, some = parser.push(text[a:b])
            said, found = said + more, found + some
        more, some = parser.flush()
        assert (said + more).strip() == ""
        assert [json.loads(call.arguments) for call in found + some] == [call["arguments"] for call in calls]
        assert {call.name for call in found + some} == {"get_weather"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_forced_call_that_is_cut_leaks_nothing(name: str) -> None:
    template = ChatTemplate(loaded_with(TEMPLATES[name]))
    form = template.format
    text = f'{form.prefix}get_weather{form.middle}{{"city": "Rome"}}{form.suffix}'.replace("\x00", "abcdefghi")
    for size in range(len(text)):
        parser = CallParser(form, ["get_weather"], forced=True)
        said, calls = parser.push(text[:size])
        more, rest = parser.flush(cut=True)
        assert said + more == ""
        for call in calls + rest:
            assert call.name == "get_weather"
            assert '{"city": "Rome"}'.startswith(call.arguments)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [("f", '{"a": 1}')]),
        ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}', [("f", "{}"), ("g", "{}")]),
        ('{"name": "Ann", "arguments": {}}', []), ('{"name": "f", "age": 5}', []), ('{"name": "f"', []),
        ("```json\n[1]\n```", []), ("```python\nx```", []), ("{ no", []),
    ],
)  # fmt: skip
def test_a_call_without_marks_is_one_if_it_is_all_there_is(text: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text)):
        parser = CallParser(names=["f", "g"])
        said, found = "", []
        for piece in pieces:
            more, some = parser.push(piece)
            said, found = said + more, found + some
        more, some = parser.flush()
        assert [(call.name, call.arguments) for call in found + some] == calls
        assert said + more == ("" if calls else text)


def test_texts_that_spell_tokens_are_grammar_all_the_same() -> None:
    """Values of a schema, too: the tokens of the vocabulary must not be taken for them."""
    loaded = loaded_with(TEMPLATES["hermes"], marks=False)
    llm = LLM(loaded, kv_cache_dtype="int8", kv_cache_memory="4MiB", progress=False)
    grammar = GrammarCompiler(loaded).json_schema({"enum": ["<tool_call>", "[TOOL_CALLS]</s>"]})
    output = llm.generate("say:", SamplingParams(max_tokens=40, grammar=grammar))[0].outputs[0]
    assert json.loads(output.text) in ("<tool_call>", "[TOOL_CALLS]</s>")


def test_a_strict_tool_binds_only_calls() -> None:
    loaded = loaded_with(TEMPLATES["hermes"], marks=False)
    preparer = Preparer(loaded, RequestLimits(loaded.geometry.vocab_size, 1024, 1024, 1 << 22))
    strict: dict[str, Any] = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": [strict]})
    grammar = preparer.grammars.of_chat(body)
    assert grammar is not None
    encode: Callable[[str], list[int]] = lambda text: loaded.tokenizer(text)["input_ids"]  # noqa: E731

    def allowed(text: str) -> bool:
        matcher = grammar.start()
        for token in encode(text):
            if matcher.finished or not bool(matcher.allowed()[token]):
                return False
            matcher.accept(token)
        return True

    assert allowed('Anything {"name": 1} at all')
    assert allowed('Let me see. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>')
    assert not allowed('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"')
    assert not allowed("<tool_call>\nwell")


def test_the_templates_of_other_projects(request: pytest.FixtureRequest) -> None:
    directory = request.config.getoption("--chat-templates")
    if directory is None:
        pytest.skip("--chat-templates names no directory")
    refused = {}
    for path in sorted(Path(directory).glob("*.jinja")):
        loaded = loaded_with(path.read_text("utf-8"))
        try:
            check_rendered(rendered(ChatTemplate(loaded), loaded))
        except Exception as error:
            refused[path.stem] = str(error)
    # It asks for a list of functions in words of its own.
    assert set(refused) <= {"fireworks-ai-llama-3-firefunction-v2"}, refused
