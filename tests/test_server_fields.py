"""Fields of the API one by one: what each does, against the library's own answers, or by what name it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from helpers.serving import CONTEXT, MODEL, Running, engine_of, running
from helpers.tiny import tiny_model
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from kvbits.models import LoadedModel

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hello"}
ASK: dict[str, Any] = {"model": MODEL, "messages": [USER], "max_tokens": 8, "temperature": 0}
WRITE: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(byte_loaded: LoadedModel) -> Iterator[Running]:
    with running(engine_of(byte_loaded)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def post(server: Running, path: str, body: dict[str, Any], **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={**body, **fields}, timeout=60)


def chat(server: Running, **fields: Any) -> dict[str, Any]:
    answer = post(server, CHAT, ASK, **fields)
    assert answer.status_code == 200, answer.text
    ChatCompletion.model_validate(answer.json(), strict=False)
    return dict(answer.json())


def write(server: Running, **fields: Any) -> dict[str, Any]:
    answer = post(server, TEXT, WRITE, **fields)
    assert answer.status_code == 200, answer.text
    Completion.model_validate(answer.json(), strict=False)
    return dict(answer.json())


NOTHING: list[dict[str, Any]] = [
    {"skip_special_tokens": True}, {"min_tokens": 0}, {"spaces_between_special_tokens": True}, {"length_penalty": 1.0},
    {"use_beam_search": False}, {"best_of": 1}, {"echo": False}, {"bad_words": []}, {"prompt_logprobs": None},
    {"truncate_prompt_tokens": None}, {"allowed_token_ids": None}, {"structured_outputs": None},
    {"include_stop_str_in_output": False}, {"return_token_ids": False}, {"logits_processors": None}, {"top_k": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_what_asks_for_nothing_changes_nothing(server: Running, fields: dict[str, Any]) -> None:
    assert chat(server, **fields)["choices"] == chat(server)["choices"]
    assert write(server, **fields)["choices"] == write(server)["choices"]


def test_without_thoughts_is_what_a_template_that_knows_none_does(server: Running) -> None:
    assert chat(server, chat_template_kwargs={"enable_thinking": False})["choices"] == chat(server)["choices"]
    refused = post(server, CHAT, ASK, chat_template_kwargs={"enable_thinking": True})
    assert refused.json()["error"]["param"] == "chat_template_kwargs.enable_thinking"


def test_usage_in_each_chunk_is_part_of_usage_at_all(server: Running) -> None:
    for options, wanted in ({"continuous_usage_stats": True}, False), ({"include_usage": True}, False), (
        {"include_usage": True, "continuous_usage_stats": True}, True,
    ):  # fmt: skip
        text = post(server, TEXT, WRITE, stream=True, stream_options=options).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert all((chunk.get("usage") is not None) is wanted for chunk in chunks if chunk["choices"])
        assert any(not chunk["choices"] for chunk in chunks) is options.get("include_usage", False)


def test_a_chat_takes_what_its_own_messages_carry(server: Running) -> None:
    """Clients send back what they got, with fields of their own."""
    parts = [{"type": "text", "text": "hel", "cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {}},
             {"type": "text", "text": "lo", "annotations": []}]  # fmt: skip
    again = {"role": "assistant", "content": "x", "parsed": {"a": 1}, "reasoning": None, "thinking_blocks": [],
             "provider_specific_fields": {}, "annotations": [], "refusal": None}  # fmt: skip
    plain = [USER, {"role": "assistant", "content": "x"}, USER]
    assert chat(server, messages=plain)["choices"] == chat(
        server, messages=[{"role": "user", "content": parts, "odd": 1}, again, USER]
    )["choices"]  # fmt: skip


def test_text_ends_at_what_ends_it(server: Running) -> None:
    whole = write(server, max_tokens=40)["choices"][0]["text"]
    stop = next(c for c in whole[5:] if c.isascii() and c.isprintable())
    place = whole.index(stop)
    assert write(server, max_tokens=40, stop=stop)["choices"][0]["text"] == whole[:place]
    kept = write(server, max_tokens=40, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == whole[: place + 1]
    later = write(server, max_tokens=40, stop=stop, min_tokens=30)["choices"][0]["text"]
    assert later.startswith(whole[: place + 1])


def test_min_tokens_hold_back_the_end(server: Running, byte_loaded: LoadedModel) -> None:
    end = byte_loaded.tokenizer.eos_token_id
    fields = {"logit_bias": {str(end): 100}, "max_tokens": 20}
    assert write(server, **fields)["usage"]["completion_tokens"] == 1
    # The token that ends an answer is not part of it, but where ids are wanted, it has one.
    assert set(map(len, write(server, **fields, logprobs=1)["choices"][0]["logprobs"].values())) == {0}
    assert chat(server, **fields, logprobs=True)["choices"][0]["logprobs"]["content"] == []
    fields |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    assert write(server, **fields, logprobs=1)["choices"][0]["logprobs"]["tokens"] == [f"token_id:{end}"]
    [entry] = chat(server, **fields, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert entry["token"] == f"token_id:{end}"
    fields = {"logit_bias": {str(end): 100}, "max_tokens": 20}
    assert write(server, **fields, min_tokens=7)["usage"]["completion_tokens"] == 8
    # One that is also a stop token, and with a draw.
    fields = {"logit_bias": {"70": 100}, "stop_token_ids": [70], "max_tokens": 20, "temperature": 1.0}
    assert write(server, **fields, min_tokens=5)["usage"]["completion_tokens"] == 6


def test_special_tokens_are_shown_where_wanted(server: Running, byte_loaded: LoadedModel) -> None:
    pad = byte_loaded.tokenizer.convert_tokens_to_ids("<pad>")
    fields = {"allowed_token_ids": [pad, 80], "logit_bias": {str(pad): 50}, "max_tokens": 3, "ignore_eos": True}
    assert write(server, **fields)["choices"][0]["text"] == ""
    assert write(server, **fields, skip_special_tokens=False)["choices"][0]["text"] == "<pad>" * 3


def test_only_allowed_tokens_and_no_bad_words(server: Running) -> None:
    letters = [byte - 33 + 3 for byte in b"ab"]
    found = write(server, allowed_token_ids=letters, max_tokens=60, temperature=2, seed=3)["choices"][0]["text"]
    assert set(found) == {"a", "b"}
    fields: dict[str, Any] = {"allowed_token_ids": letters, "max_tokens": 60, "temperature": 2, "seed": 3}
    words = write(server, **fields, bad_words=["aba", "bbb"])["choices"][0]["text"]
    assert len(words) == 60
    assert not re.search("aba|bbb", words)
    assert re.search("aba|bbb", found)
    refused = post(server, TEXT, WRITE, allowed_token_ids=letters, bad_words=["a", "b"])
    assert refused.status_code in (400, 500)
    assert "bad_words" in refused.json()["error"]["message"]


@pytest.mark.parametrize("n", [1, 3])
def test_token_ids_and_the_probabilities_of_a_prompt(server: Running, byte_loaded: LoadedModel, n: int) -> None:
    reference = tiny_model("llama", vocab_size=259, max_position_embeddings=CONTEXT)
    found = write(server, prompt=["abcd", "xy"], n=n, return_token_ids=True, prompt_logprobs=2, max_tokens=5)
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * n))
    for choice in found["choices"]:
        prompt = choice["prompt_token_ids"]
        assert byte_loaded.tokenizer.decode(prompt) == ("abcd", "xy")[choice["index"] // n]
        assert len(choice["token_ids"]) <= 5
        logits = reference(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        for place, entry in enumerate(rest):
            own = entry[str(prompt[place + 1])]
            assert own["logprob"] == pytest.approx(float(logits[place, prompt[place + 1]].detach()), abs=0.05)
            assert sorted(e["rank"] for e in entry.values())[:2] == [1, 2]
    whole = chat(server, n=n, return_token_ids=True, prompt_logprobs=0)
    assert len(whole["prompt_logprobs"]) == len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert sum(len(choice["token_ids"]) for choice in whole["choices"]) == whole["usage"]["completion_tokens"]


def test_a_stream_has_every_token_id_and_the_usage_so_far(client: openai.OpenAI, server: Running) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    body: Any = {"return_token_ids": True}
    chunks = list(client.chat.completions.create(
        stream=True, stream_options=options, extra_body=body, **ASK
    ))  # fmt: skip
    ids = [token for chunk in chunks for c in chunk.choices for token in c.to_dict().get("token_ids", [])]  # type: ignore
    assert ids == chat(server, return_token_ids=True)["choices"][0]["token_ids"]
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    # Every chunk has something new, but that of the usage, which has no choices.
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts) - 1
    assert counts[-1] == len(ids)
    sizes = {
        len(str(chunk.choices[0].delta.content or "")) + len(chunk.to_dict()["obfuscation"])  # type: ignore[arg-type]
        for chunk in chunks
        if chunk.choices
    }
    assert all(size % 32 == 0 for size in sizes)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict(), strict=False)


def test_a_prompt_is_cut_where_wanted(server: Running) -> None:
    text = "".join(chr(97 + i % 26) for i in range(3 * CONTEXT))
    assert post(server, TEXT, WRITE, prompt=text).status_code == 400
    found = write(server, prompt=text, truncate_prompt_tokens=10, return_token_ids=True)
    assert found["choices"][0] == write(server, prompt=text[-10:], return_token_ids=True)["choices"][0]
    assert write(server, prompt=text, truncate_prompt_tokens=-1, max_tokens=1)["usage"]["prompt_tokens"] == CONTEXT - 1
    fields = {"truncate_prompt_tokens": 10, "truncation_side": "right", "return_token_ids": True}
    first = write(server, prompt=text[:10], return_token_ids=True)["choices"][0]
    assert write(server, prompt=text, **fields)["choices"][0] == first
    assert write(server, prompt=first["prompt_token_ids"] * 2, **fields)["choices"][0] == first
    long = [{"role": "user", "content": text}]
    assert chat(server, messages=long, truncate_prompt_tokens=20)["usage"]["prompt_tokens"] == 20
    refused = post(server, TEXT, WRITE, truncate_prompt_tokens=CONTEXT + 1)
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[0-9]{3}-[a-f]"}, "[0-9]{3}-[a-f]"),
        ({"json": {"enum": ["a", 5]}}, '"a"|5'),
        ({"json": '{"type": "boolean"}'}, "true|false"),
        ({"grammar": 'root ::= "x" [0-9] | "y"'}, "x[0-9]|y"),
        ({"grammar": 'start: "p" | "q" NUM\nNUM: /[0-9]{2}/'}, "p|q[0-9]{2}"),
    ],
    ids=str,
)
def test_structured_outputs(server: Running, wanted: dict[str, Any], pattern: str) -> None:
    for seed in range(4):
        fields = {"structured_outputs": wanted, "temperature": 1.5, "seed": seed, "max_tokens": 40}
        assert re.fullmatch(pattern, chat(server, **fields)["choices"][0]["message"]["content"])
        assert re.fullmatch(pattern, write(server, **fields)["choices"][0]["text"])


def test_the_last_message_is_continued(server: Running) -> None:
    talk = [USER, {"role": "assistant", "content": "The answer is"}]
    fields = {"messages": talk, "add_generation_prompt": False}

    def text(**more: Any) -> str:
        tokens = post(server, "/tokenize", {"messages": talk, "add_generation_prompt": False, **more}).json()["tokens"]
        return str(post(server, "/detokenize", {"tokens": tokens}).json()["prompt"])

    assert text(continue_final_message=True).endswith("[assistant]The answer is")
    assert text().endswith("The answer is\n")
    prompt = text(continue_final_message=True)
    found = chat(server, **fields, continue_final_message=True)
    assert found["choices"][0]["message"]["content"] == write(server, prompt=prompt)["choices"][0]["text"]
    refused = post(server, CHAT, ASK, messages=talk, continue_final_message=True)
    assert refused.json()["error"]["param"] == "continue_final_message"


def test_metadata_comes_back_and_nothing_is_stored(server: Running) -> None:
    found = chat(server, metadata={"run": "7"}, store=True)
    assert (found["metadata"], found["store"]) == ({"run": "7"}, False)
    assert post(server, CHAT, ASK, metadata={"a": "x" * 600}).json()["error"]["param"] == "metadata"


def test_token_names_by_id(server: Running) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = chat(server, **fields)["choices"][0]
    assert [e["token"] for e in choice["logprobs"]["content"]] == [f"token_id:{i}" for i in choice["token_ids"]]
    choice = write(server, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


def test_the_probabilities_of_named_tokens(server: Running) -> None:
    reference = tiny_model("llama", vocab_size=259, max_position_embeddings=CONTEXT)
    wanted = {"logprob_token_ids": [90, 5], "return_tokens_as_token_ids": True, "allowed_token_ids": [70],
              "max_tokens": 2}  # fmt: skip
    prompt = post(server, "/tokenize", {"prompt": "abc"}).json()["tokens"]
    logits = reference(torch.tensor([[*prompt, 70]])).logits[0, -2:].float().log_softmax(-1)
    found = write(server, logprobs=3, **wanted)["choices"][0]["logprobs"]
    for place, shown in enumerate(found["top_logprobs"]):
        assert shown == {
            f"token_id:{t}": pytest.approx(float(logits[place, t].detach()), abs=0.05) for t in (90, 5, 70)
        }
    # They are told instead of the likeliest, which need not be asked for.
    told = chat(server, logprobs=True, **wanted)["choices"][0]["logprobs"]["content"]
    assert [{e["token"] for e in at["top_logprobs"]} for at in told] == [{f"token_id:{t}" for t in (90, 5, 70)}] * 2


def test_what_is_not_asked_for_is_null(server: Running) -> None:
    """As vLLM's users read it: an attribute that is there."""
    assert write(server)["choices"][0].items() >= {
        "token_ids": None, "prompt_token_ids": None, "prompt_logprobs": None
    }.items()  # fmt: skip
    found = chat(server)
    assert found["choices"][0]["token_ids"] is found["prompt_token_ids"] is found["prompt_logprobs"] is None


@pytest.mark.parametrize("n", [1, 2])
def test_a_chat_echoes_the_message_that_it_continues(client: openai.OpenAI, server: Running, n: int) -> None:
    said = {"role": "assistant", "content": [{"type": "text", "text": "The answer"}, {"type": "text", "text": " is"}]}
    fields: dict[str, Any] = {"messages": [USER, said], "add_generation_prompt": False, "continue_final_message": True}
    plain = [c["message"]["content"] for c in chat(server, **fields, n=n)["choices"]]
    echoed = [c["message"]["content"] for c in chat(server, **fields, n=n, echo=True)["choices"]]
    assert echoed == [f"The answer is{text}" for text in plain]
    streamed = [""] * n
    for chunk in client.chat.completions.create(
        stream=True, n=n, extra_body={"echo": True, **fields}, **ASK
    ):  # fmt: skip
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == echoed
    # A user's words are not the answer's beginning.
    assert chat(server, echo=True)["choices"] == chat(server)["choices"]


def test_openai_s_helper_sees_calls_and_words_end(client: openai.OpenAI) -> None:
    colour = {"type": "object", "properties": {"c": {"enum": ["red"]}}, "required": ["c"],
              "additionalProperties": False}  # fmt: skip
    tool: Any = {"type": "function", "function": {"name": "paint", "strict": True, "parameters": colour}}
    named: Any = {"type": "function", "function": {"name": "paint"}}
    fields: dict[str, Any] = {**ASK, "max_tokens": 200}
    for more, ended in (({}, "content.done"), ({"tools": [tool], "tool_choice": named}, "arguments.done")):
        with client.chat.completions.stream(**fields, **more) as stream:
            kinds = [event.type for event in stream]
        assert sum(kind.endswith(ended) for kind in kinds) == 1, kinds


def test_all_wrong_keys_of_a_bias_are_named(server: Running) -> None:
    message = post(server, CHAT, ASK, logit_bias={"bad1": 1, "5": 1, "bad2": 2}).json()["error"]["message"]
    assert "'bad1', 'bad2'" in message
    message = post(server, CHAT, ASK, logit_bias={f"k{i}": 1 for i in range(200)}).json()["error"]["message"]
    assert "'k7' ..." in message
    assert "'k8'" not in message


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "od"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "od"}}}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}
BAD_CALL = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]}
PATHS: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 0}), ("n", {"n": 500}), ("temperature", {"temperature": -1}), ("top_p", {"top_p": 1.5}),
    ("seed", {"seed": 2**64 - 1 + 2**62}), ("stop", {"stop": ["x" * 300]}), ("stop.1", {"stop": ["x", 5]}),
    ("logit_bias", {"logit_bias": {"5": 101}}), ("logit_bias", {"logit_bias": {"999": 1}}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}), ("bad_words", {"bad_words": ["x"] * 200}),
    ("logprob_token_ids", {"logprobs": True, "logprob_token_ids": [9999]}),
    ("logprob_token_ids", {"logprobs": True, "logprob_token_ids": [5] * 200}),
    ("logprob_token_ids", {"logprob_token_ids": [5]}), ("truncation_side", {"truncation_side": "middle"}),
    ("allowed_token_ids", {"allowed_token_ids": []}), ("allowed_token_ids", {"allowed_token_ids": [9999]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages.1.content.1", {"messages": [USER, IMAGE]}),
    ("messages.0.role", {"messages": [{"role": "robot", "content": "x"}]}),
    ("messages.0.tool_calls.0.function.arguments", {"messages": [BAD_CALL]}),
    ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}), ("max_tokens", {"max_tokens": CONTEXT}),
    ("max_completion_tokens", {"max_tokens": None, "max_completion_tokens": CONTEXT}),
    ("chat_template_kwargs.odd", {"chat_template_kwargs": {"odd": 1}}),
    ("reasoning_effort", {"reasoning_effort": "low"}),
    ("response_format", {"response_format": SCHEMA}), ("tools", {"tools": [TOOL], "tool_choice": "required"}),
    ("tool_choice", {"tool_choice": "required"}), ("use_beam_search", {"use_beam_search": True}),
    ("structured_outputs", {"structured_outputs": {"regex": "("}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}), ("top_logprobs", {"top_logprobs": 1}),
    ("stream_options", {"stream_options": {}}), ("chat_template_kwargs.tools", {"chat_template_kwargs": {"tools": []}}),
    ("spaces_between_special_tokens", {"spaces_between_special_tokens": False}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), PATHS, ids=lambda value: str(value)[:60])
def test_an_error_has_the_path_of_its_field(server: Running, param: str, fields: dict[str, Any]) -> None:
    answer = post(server, CHAT, ASK, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_what_is_too_long_says_so_in_the_words_that_clients_know(server: Running) -> None:
    long = [{"role": "user", "content": "x" * CONTEXT}]
    for answer in (post(server, CHAT, ASK, messages=long), post(server, TEXT, WRITE, prompt=[70] * CONTEXT),
                   post(server, CHAT, ASK, max_tokens=CONTEXT)):  # fmt: skip
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert f"this model's maximum context length is {CONTEXT} tokens" in error["message"]


def test_health_by_its_other_names(server: Running) -> None:
    assert httpx.head(server.url + "/health").status_code == 200
    for path in ("/ping", "/v1/health"):
        assert httpx.get(server.url + path).json() == {"status": "ok"}
    assert "embeddings" in post(server, "/v1/embeddings", {"input": "x"}).json()["error"]["message"]


def test_tokenize_has_a_limit(server: Running) -> None:
    found = post(server, "/tokenize", {"prompt": "x" * 100_000}).json()
    assert (found["count"], found["token_strs"]) == (100_000, None)
    for body in ({"prompt": "x" * 200_000}, {"messages": [{"role": "user", "content": "x" * 200_000}]}):
        answer = post(server, "/tokenize", body)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert json.loads(answer.content)
