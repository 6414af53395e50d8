"""Parts of the server alone: tool calls in text, grammars, the pool's map."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits import LLM, SamplingParams
from kvbits.engine.grammar import GrammarCompiler
from kvbits.errors import RequestError
from kvbits.models import LoadedModel
from kvbits.pages import PageManager
from kvbits.server.tools import CallParser

ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool>"}}\n</tool_call>'
TWO = '<tool_call>{"name": "g"}</tool_call>'


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser()
    said, calls = "", []
    for piece in pieces:
        text, found = parser.push(piece)
        said += text
        calls += [(call.name, call.arguments) for call in found]
    return said + parser.flush(), calls


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain < text", "plain < text", []),
        (ONE, "", [("f", '{"a": "</tool>"}')]),
        (f"Let me see.\n{ONE}\n{TWO}\n", "Let me see.\n", [("f", '{"a": "</tool>"}'), ("g", "{}")]),
        (f"{TWO} and so", "and so", [("g", "{}")]),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('x <tool_call>{"name": "f"', 'x <tool_call>{"name": "f"', []),
        ("ends with <tool_", "ends with <tool_", []),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert parse([text]) == (said, calls)
    assert parse(list(text)) == (said, calls)
    for seed in range(20):
        cuts = sorted(random.Random(seed).sample(range(len(text) + 1), 3))
        assert parse([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == (said, calls)


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = CallParser()
    assert parser.push("see <tool") == ("see ", [])
    assert parser.push("box>") == ("<toolbox>", [])


@pytest.fixture(scope="module")
def llm(byte_loaded: LoadedModel) -> LLM:
    return LLM(byte_loaded, kv_cache_dtype="int8", kv_cache_memory="4MiB", progress=False)


@pytest.fixture(scope="module")
def compiler(byte_loaded: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(byte_loaded)


_VALUES = st.sampled_from(
    [
        {"type": "boolean"}, {"type": "null"}, {"enum": ["a", "é", 3]}, {"const": {"k": [1]}},
        {"type": "integer", "minimum": 3, "maximum": 12}, {"type": "string", "maxLength": 4},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    ]
)  # fmt: skip
_SCHEMAS = st.dictionaries(st.sampled_from(["a", "b", "long name"]), _VALUES, min_size=1).map(
    lambda fields: {
        "type": "object", "properties": fields, "required": list(fields), "additionalProperties": False
    }
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 1000), greedy=st.booleans())
def test_what_is_written_under_a_schema_is_valid(
    llm: LLM, compiler: GrammarCompiler, schema: dict[str, object], seed: int, greedy: bool
) -> None:
    params = SamplingParams(
        max_tokens=400, seed=seed, temperature=0.0 if greedy else 1.5, grammar=compiler.json_schema(schema), n=2
    )
    for output in llm.generate("say:", params)[0].outputs:
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), schema)


def test_a_grammar_ends_the_answer_even_when_end_tokens_are_ignored(llm: LLM, compiler: GrammarCompiler) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True, grammar=compiler.lark('start: "yes" | "no"'))
    output = llm.generate("well?", params)[0].outputs[0]
    assert output.text in ("yes", "no")
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("schema", [{"type": "odd"}, {"$ref": "#/nowhere"}, {"pattern": "("}, 3, None, ["a"]])
def test_a_schema_that_is_wrong_is_a_request_error(compiler: GrammarCompiler, schema: object) -> None:
    with pytest.raises(RequestError, match="schema"):
        compiler.json_schema(schema)


def test_the_map_shows_every_frame() -> None:
    pages = PageManager(20, open_frames=2)
    tokens = list(range(150))
    for seq_id in (1, 2):
        cached = pages.open(seq_id, tokens)
        pages.reserve(seq_id, len(tokens) - cached)
        pages.commit(seq_id, tokens[cached:])
    assert pages.length(2) == 150
    found = pages.map()
    assert (found.count(b"x"), found.count(b"s"), found.count(b"o"), found.count(b"c")) == (2, 0, 4, 0)
    pages.free(1)
    assert (pages.map().count(b"x"), pages.map().count(b"s"), pages.map().count(b"o")) == (0, 2, 2)
    pages.reserve(2, 70)
    assert pages.map().count(b"s") == 3
    pages.free(2)
    assert (pages.map().count(b"c"), pages.map().count(b".")) == (2, 18)
    stats = pages.stats()
    assert (stats.cached, stats.free) == (2, 18)
