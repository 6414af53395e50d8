"""``LLM`` for those who come from vLLM, and ``AsyncLLM``: the same answers, from asyncio."""

from __future__ import annotations

import asyncio

import pytest
from helpers.serving import CONTEXT, byte_model

from kvbits import LLM, AsyncLLM, SamplingParams
from kvbits.errors import ConfigError, RequestError

OPTIONS = {"kv_cache_dtype": "int4", "kv_cache_memory": "4MiB"}
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def test_with_repr_and_close() -> None:
    with LLM(byte_model(), **OPTIONS) as llm:
        for part in ("LLM('tiny'", "'int4'", "bits per element", "MiB", f"{CONTEXT:,} tokens", "cpu"):
            assert part in repr(llm)
        assert llm.get_tokenizer() is llm.tokenizer
        prompt = "a page is sixty-four tokens, " * 8
        (first,) = llm.generate(prompt, GREEDY)
        (again,) = llm.generate(prompt, GREEDY)
        assert again.num_cached_tokens > first.num_cached_tokens == 0
        assert llm.reset_prefix_cache() is True
        (anew,) = llm.generate(prompt, GREEDY)
        assert anew.num_cached_tokens == 0
        assert anew.outputs[0].token_ids == first.outputs[0].token_ids
    assert "closed" in repr(llm)
    llm.close()
    with pytest.raises(RequestError, match="this LLM is closed"):
        llm.generate("x", GREEDY)


def test_options_of_vllm_are_accepted_or_refused_with_what_to_use() -> None:
    loaded = byte_model()
    LLM(loaded, dtype="auto", tensor_parallel_size=1, enforce_eager=True, swap_space=0, **OPTIONS).close()
    for name, value, instead in (
        ("tensor_parallel_size", 2, "--ray"),
        ("gpu_memory_utilization", 0.9, "kv_cache_memory='8GiB'"),
        ("swap_space", 4, "kv_offload_size"),
        ("quantization", "awq", "weights='int8'"),
        ("seed", 7, "SamplingParams"),
    ):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}") as refused:
            LLM("no-such-model", **{name: value})
        assert instead in str(refused.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        LLM("no-such-model", modle=1)


def test_the_models_own_sampling_is_the_default() -> None:
    loaded = byte_model()
    assert LLM(loaded, **OPTIONS).get_default_sampling_params() == SamplingParams()
    loaded.model.generation_config.update(temperature=0.3, top_k=7, repetition_penalty=1.2, do_sample=True)
    loaded = byte_model()  # the property is kept, so another object
    loaded.model.generation_config.update(temperature=0.3, top_k=1, repetition_penalty=1.2, do_sample=True)
    llm = LLM(loaded, **OPTIONS)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.3, top_k=1, repetition_penalty=1.2)
    expected = llm.generate("hello", SamplingParams(temperature=0, repetition_penalty=1.2))
    assert llm.generate("hello")[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


def test_async_answers_are_those_of_the_llm() -> None:
    loaded = byte_model()
    prompts = [f"prompt {i}: " + "x" * 20 * i for i in range(5)]
    expected = [o.outputs[0].token_ids for o in LLM(loaded, **OPTIONS).generate(prompts, GREEDY)]

    async def one(llm: AsyncLLM, prompt: str) -> list[int]:
        found: list[int] = []
        async for output in llm.generate(prompt, GREEDY):
            tokens = output.outputs[0].token_ids
            assert tokens[: len(found)] == found
            assert len(tokens) > len(found) or output.finished
            found = tokens
        return found

    async def run() -> list[list[int]]:
        async with AsyncLLM(loaded, **OPTIONS) as llm:
            assert "AsyncLLM('tiny'" in repr(llm)
            found = await asyncio.gather(*(one(llm, prompt) for prompt in prompts))
            assert await llm.reset_prefix_cache() is True
            assert await llm.get_tokenizer() is loaded.tokenizer
        with pytest.raises(RequestError, match="shut down"):
            await one(llm, "x")
        return list(found)

    assert asyncio.run(run()) == expected


def test_async_requests_that_are_left_aborted_or_refused_leave_no_page() -> None:
    async def run() -> None:
        async with AsyncLLM(byte_model(), **OPTIONS) as llm:
            async for _ in llm.generate("left", SamplingParams(max_tokens=900, ignore_eos=True)):
                break
            with pytest.raises(RequestError, match="context"):
                async for _ in llm.generate("x" * 5000, GREEDY):
                    pass
            endless = SamplingParams(max_tokens=900, ignore_eos=True)
            mine = llm.generate("x", endless, "mine")
            await anext(mine)
            await llm.abort("mine")
            with pytest.raises(RequestError, match="'mine' was aborted"):
                [None async for _ in mine]
            first = llm.generate("x", endless, "two")
            await anext(first)
            with pytest.raises(RequestError, match="already running"):
                await anext(llm.generate("y", GREEDY, "two"))
            await first.aclose()
            said = [output async for output in llm.chat([{"role": "user", "content": "hi"}], GREEDY)]
            assert said[-1].finished
            await llm.reset_prefix_cache()
            engine = llm.llm.engine
            while engine.has_unfinished():
                await asyncio.sleep(0.01)
            engine.pages.check()
            stats = engine.pages.stats()
            assert (stats.open, stats.sealed) == (0, 0)

    asyncio.run(run())


def test_an_engine_that_breaks_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        llm = AsyncLLM(byte_model(), **OPTIONS)

        def broken(*_: object) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(llm.llm.engine, "step", broken)
        with pytest.raises(RuntimeError, match="broken"):
            async for _ in llm.generate("x", GREEDY):
                pass
        with pytest.raises(RequestError, match="internal error"):
            async for _ in llm.generate("x", GREEDY):
                pass
        llm.shutdown()

    asyncio.run(run())
