"""Prompts, parameters and messages of ``LLM`` and ``AsyncLLM``: vLLM's dictionaries work, anything else is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.serving import byte_model

from kvbits import LLM, AsyncLLM, SamplingParams
from kvbits.errors import ConfigError, RequestError

OPTIONS: dict[str, Any] = {"kv_cache_dtype": "int8", "kv_cache_memory": "4MiB"}
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(byte_model(), progress=False, **OPTIONS) as found:
        yield found


def test_every_way_to_write_a_prompt_is_the_same_prompt(llm: LLM) -> None:
    text = "hello"
    ids = llm.tokenizer(text)["input_ids"]
    ways: list[Any] = [
        text, ids, tuple(ids), np.array(ids), torch.tensor(ids), {"prompt": text}, {"prompt_token_ids": ids},
        {"prompt_token_ids": np.array(ids), "prompt": None}, {"prompt": "only its name", "prompt_token_ids": ids},
    ]  # fmt: skip
    expected = llm.generate(text, GREEDY)[0]
    assert expected.prompt_token_ids == ids
    for way, together in zip(ways, llm.generate(ways, GREEDY), strict=True):
        (alone,) = llm.generate(way, GREEDY)
        for found in (alone, together):
            assert found.prompt_token_ids == ids, way
            assert found.outputs[0].token_ids == expected.outputs[0].token_ids, way
    assert [o.prompt for o in llm.generate(ways[-1:], GREEDY)] == ["only its name"]


def test_salts_separate_prefix_caches(llm: LLM) -> None:
    prompt = "a page is sixty-four tokens; " * 6

    def cached(**more: str) -> int:
        return llm.generate({"prompt": prompt, **more}, GREEDY)[0].num_cached_tokens

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="b") == 0
    assert cached(cache_salt="a") > 0
    assert cached() == 0


WRONG: list[tuple[Any, str]] = [
    (5, "the prompts must be"), (None, "the prompts must be"), (b"x", "not bytes"), ([["a"]], "prompt 0 holds 'a'"),
    (["x", 5], "prompt 1 must be"), ([5, "x"], "prompt 0 must be"), ([[1, True]], "prompt 0 holds True"),
    ([[1.5]], "token ids are integers"), ({}, "neither 'prompt' nor"), ({"prompt": 5}, "it must be text"),
    ({"prompts": "x"}, "the key 'prompts'"), ({"prompt_token_ids": "x"}, "must be token ids"),
    ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
    ({"prompt": "x", "cache_salt": 5}, "cache_salt of the prompt"), (["x", {"prompt": None}], "prompt 1 has neither"),
]  # fmt: skip


@pytest.mark.parametrize(("prompts", "words"), WRONG, ids=repr)
def test_what_is_no_prompt_is_refused_by_its_place(llm: LLM, prompts: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        llm.generate(prompts, GREEDY)
    assert words in str(refused.value)


@pytest.mark.parametrize("params", [5, "x", {"temperature": 0}, [GREEDY, {"n": 2}], [GREEDY]], ids=repr)
def test_what_are_no_parameters_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ConfigError, match="sampling"):
        llm.generate(["x", "y"], params)


def test_messages_in_parts_or_whole(llm: LLM) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    call = {"role": "assistant", "tool_calls": []}
    whole = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]
    expected = llm.chat(whole, GREEDY)[0]
    for chat in ([{"role": "user", "content": parts}, call], [{"role": "user", "content": ["hello"]}, call]):
        found = llm.chat([chat, chat], GREEDY)
        assert [o.prompt_token_ids for o in found] == [expected.prompt_token_ids] * 2
    image = {"type": "image_url", "image_url": {"url": "x"}}
    wrong: list[tuple[Any, str]] = [
        (5, "the messages"), ([5], "a chat must be"), ([{"content": "x"}], "message 0"),
        ([{"role": "user"}], "no 'content'"), ([{"role": "user", "content": 5}], "content of message 0"),
        ([{"role": "user", "content": [image]}], "part 0 of message 0 is of type 'image_url'"),
    ]  # fmt: skip
    for messages, words in wrong:
        with pytest.raises(RequestError, match=words):
            llm.chat(messages, GREEDY)


def test_the_async_engine_takes_and_refuses_the_same(llm: LLM) -> None:
    ids = llm.tokenizer("hello")["input_ids"]
    expected = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
    long = "a page is sixty-four tokens; " * 6

    async def last(found: Any) -> Any:
        return [output async for output in found][-1]

    async def run() -> None:
        async with AsyncLLM(byte_model(), **OPTIONS) as engine:
            for way in ("hello", ids, np.array(ids), {"prompt": "hello"}, {"prompt_token_ids": ids}):
                output = await last(engine.generate(way, GREEDY))
                assert (output.prompt_token_ids, output.outputs[0].token_ids) == (ids, expected)
            for salt, hit in (("a", False), ("b", False), ("a", True)):
                output = await last(engine.generate({"prompt": long, "cache_salt": salt}, GREEDY))
                assert (output.num_cached_tokens > 0) is hit
            parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
            chat = await last(engine.chat(parts, GREEDY))
            assert chat.prompt_token_ids == llm.chat(parts, GREEDY)[0].prompt_token_ids
            for wrong in (5, {"text": "x"}, ["x", "y"], [1.5]):
                with pytest.raises(RequestError):
                    await last(engine.generate(wrong, GREEDY))  # type: ignore[arg-type]
            with pytest.raises(RequestError, match="message 0"):
                await last(engine.chat([{"content": "x"}], GREEDY))
            with pytest.raises(ConfigError, match="SamplingParams"):
                await last(engine.generate("x", {"n": 1}))  # type: ignore[arg-type]
        engine.llm.close()

    asyncio.run(run())
