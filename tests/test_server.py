"""The server through the stock client: chat, streams, tools, log-probabilities, JSON, prompts, errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from helpers.serving import MODEL, Running

from kvbits import LLM, SamplingParams
from kvbits.models import LoadedModel

ASK: Any = [{"role": "user", "content": "hello there"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop_now"}},
]


@pytest.fixture(scope="module")
def llm(byte_loaded: LoadedModel) -> LLM:
    return LLM(byte_loaded, kv_cache_dtype="int8", kv_cache_memory="4MiB", max_num_batched_tokens=256, progress=False)


def test_a_chat_is_answered_as_the_library_answers_it(client: openai.OpenAI, llm: LLM) -> None:
    for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7, "top_p": 0.8}):
        answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20, **params)
        want = llm.chat(ASK, SamplingParams(max_tokens=20, **params))[0]
        assert answer.choices[0].message.content == want.outputs[0].text
        assert answer.choices[0].finish_reason == want.outputs[0].finish_reason
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(want.prompt_token_ids)
        assert answer.usage.completion_tokens == len(want.outputs[0].token_ids)


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    own = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "ignore_eos": True, "stop_token_ids": [70]}
    shared: Any = {
        "temperature": 1.2, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25, "n": 3, "stop": ["e", "zz"],
    }  # fmt: skip
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=30, logit_bias={"80": 5, "81": -100}, extra_body=own, **shared
    )
    want = llm.generate("abc", SamplingParams(max_tokens=30, logit_bias={80: 5.0, 81: -100.0}, **own, **shared))[0]
    assert [c.text for c in answer.choices] == [o.text for o in want.outputs]
    assert [c.finish_reason for c in answer.choices] == [o.finish_reason for o in want.outputs]
    assert len({c.text for c in answer.choices}) == 3


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": ASK, "max_tokens": 30, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**options)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage
        for choice in chunk.choices:
            assert usage is None
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_stream_is_sent_as_events(server: Running) -> None:
    body = {"model": MODEL, "messages": ASK, "max_tokens": 4, "stream": True}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_of_a_chat(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    want = llm.chat(ASK, SamplingParams(max_tokens=6, temperature=0.0, logprobs=3))[0].outputs[0]
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert want.logprobs is not None
    assert [e.logprob for e in content] == pytest.approx(
        [at[token].logprob for token, at in zip(want.token_ids, want.logprobs, strict=True)], abs=1e-5
    )
    for entry in content:
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert len(entry.top_logprobs) == 3
    joined = b"".join(bytes(e.bytes or []) for e in content)
    assert joined.decode("utf-8", "replace") == answer.choices[0].message.content


def test_echo_scores_the_prompt(client: openai.OpenAI, llm: LLM) -> None:
    text = "some words to score"
    answer = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    want = llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=1))[0]
    assert choice.text == text
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list(text)
    assert choice.logprobs.text_offset == list(range(len(text)))
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert want.prompt_logprobs is not None
    expected = [at[t].logprob for t, at in zip(want.prompt_token_ids[1:], want.prompt_logprobs[1:], strict=True) if at]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_prompts_of_every_kind(client: openai.OpenAI, llm: LLM) -> None:
    options: Any = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    tokens = llm.tokenizer("abc def")["input_ids"]
    one = client.completions.create(prompt="abc def", **options).choices[0].text
    assert client.completions.create(prompt=tokens, **options).choices[0].text == one
    many = client.completions.create(prompt=["abc def", "other"], n=2, **options).choices
    assert [c.index for c in many] == [0, 1, 2, 3]
    assert many[0].text == many[1].text == one
    lists = client.completions.create(prompt=[tokens, tokens[:3]], echo=True, **options).choices
    assert lists[0].text == "abc def" + one
    assert lists[1].text.startswith("abc")
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(prompt=["abc def", "other"], stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: one, 1: many[2].text}


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            seed=seed,
            max_tokens=300,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content or "")
        assert found["colour"] in ("red", "green")
        assert isinstance(found["sure"], bool)
        assert set(found) == {"colour", "sure"}


def test_json_objects(client: openai.OpenAI) -> None:
    ended = 0
    for seed in range(6):
        answer = client.chat.completions.create(
            model=MODEL, messages=ASK, seed=seed, max_tokens=200, response_format={"type": "json_object"},
            logit_bias={"95": 12},
        )  # fmt: skip
        text = answer.choices[0].message.content or ""
        assert text.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
            ended += 1
    assert ended


def test_a_demanded_tool_is_called(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": ASK, "tools": TOOLS, "seed": 1, "max_tokens": 300}
    named: Any = {"type": "function", "function": {"name": "paint"}}
    answer = client.chat.completions.create(tool_choice=named, parallel_tool_calls=False, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "green")
    name = arguments = ""
    for chunk in client.chat.completions.create(tool_choice=named, parallel_tool_calls=False, stream=True, **options):
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.function is not None
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments) == ("paint", call.function.arguments)
    answer = client.chat.completions.create(tool_choice="required", **options).choices[0]
    assert answer.message.tool_calls
    assert {c.function.name for c in answer.message.tool_calls if c.type == "function"} <= {"paint", "stop_now"}


def test_tools_and_their_results_are_part_of_the_prompt(server: Running) -> None:
    def count(**fields: Any) -> int:
        answer = httpx.post(server.url + "/tokenize", json={"messages": ASK, **fields})
        return int(answer.json()["count"])

    assert count(tools=TOOLS) > count() + len("paint") + len("stop_now")
    call = {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}
    talk = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "it is red now"}]  # fmt: skip
    tokens = httpx.post(server.url + "/tokenize", json={"messages": talk, "tools": TOOLS}).json()["tokens"]
    text = httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>' in text
    assert "<tool_response>\nit is red now\n</tool_response>" in text


def test_a_prompt_is_cached_but_not_across_salts(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "cache me " * 40}]

    def cached(salt: str) -> int:
        body = {"cache_salt": salt}
        usage = client.chat.completions.create(model=MODEL, messages=long, max_tokens=2, extra_body=body).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached("a") == 0
    assert cached("a") >= 320
    assert cached("b") == 0


def test_models_health_version(client: openai.OpenAI, server: Running) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).model_dump()["kv_cache_dtype"] == "int8"
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert httpx.get(server.url + "/version").json()["version"]
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.models.retrieve("nothing")


def test_tokenize_is_undone_by_detokenize(server: Running) -> None:
    found = httpx.post(server.url + "/tokenize", json={"prompt": "Grüße 世界", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len("Grüße 世界".encode())
    back = httpx.post(server.url + "/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": "Grüße 世界"}


def test_metrics_count_what_was_done(client: openai.OpenAI, server: Running) -> None:
    def read() -> dict[str, float]:
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = read()
    label = f'{{model_name="{MODEL}"}}'
    usage = client.completions.create(
        model=MODEL, prompt="count me", max_tokens=9, extra_body={"ignore_eos": True}
    ).usage
    server.idle()
    after = read()
    assert usage is not None
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[f"vllm:prompt_tokens_total{label}"] == usage.prompt_tokens
    assert grown[f"vllm:generation_tokens_total{label}"] == 9
    assert grown[f"vllm:time_to_first_token_seconds_count{label}"] == 1
    assert grown[f"vllm:inter_token_latency_seconds_count{label}"] == 8
    assert grown[f"vllm:e2e_request_latency_seconds_count{label}"] == 1
    assert grown[f"vllm:request_queue_time_seconds_count{label}"] == 1
    whole, queued = (grown[f"vllm:{n}_seconds_sum{label}"] for n in ("e2e_request_latency", "request_queue_time"))
    assert 0 <= queued < whole
    assert grown[f"vllm:prefix_cache_queries_total{label}"] == usage.prompt_tokens
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert after[f"vllm:{name}{label}"] == 0
    assert any(name.startswith("vllm:cache_config_info") and 'cache_dtype="int8"' in name for name in after)
    assert sum(name.startswith("kvbits:kv_bytes{") for name in after) == 3
    frames = {s: after[f'kvbits:pool_frames{{model_name="{MODEL}",state="{s}"}}'] for s in ("free", "open", "cached")}
    assert frames["free"] + frames["cached"] == server.engine.pool.num_frames
    assert frames["open"] == 0


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    # The name of SVG is no address that anybody asks.
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
    state = httpx.get(server.url + "/kvbits/state").json()
    counts = {letter: state["pool"]["map"].count(letter) for letter in ".osxc"}
    assert counts == {
        ".": state["pool"]["free"], "o": 0, "s": 0, "x": 0, "c": state["pool"]["cached"]
    }  # fmt: skip
    assert len(state["pool"]["map"]) == state["pool"]["frames"]


def test_the_description_names_every_path_and_body(server: Running) -> None:
    found = httpx.get(server.url + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= set(found["paths"])
    assert {"ChatRequest", "CompletionRequest", "Error", "UserMessage"} <= set(found["components"]["schemas"])
    text = json.dumps(found)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(found["components"]["schemas"])
