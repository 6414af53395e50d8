"""The engine on tiny models: the same answers whatever happens around a request, and none lost."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny import tiny_tokenizer
from helpers.tiny_engine import (  # noqa: F401
    GREEDY,
    PROMPTS,
    assert_idle,
    backend,
    loaded,
    make,
    one_thread,
    original,
    packed,
    prompt_of,
    tokens,
)
from torch import Tensor, nn

import kvbits
from kvbits import LLM, SamplingParams
from kvbits.errors import ConfigError, KVBitsError, RequestError
from kvbits.kernels import Backend, default_backend
from kvbits.models import LoadedModel


def hf_logits(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


# The model


def test_greedy_text_is_hugging_faces(original: nn.Module, loaded: LoadedModel, backend: Backend) -> None:
    # float32 weights, and both sides round keys and values to bfloat16: what is left are the orders of summation.
    found = tokens(make(loaded, backend), PROMPTS)
    for prompt, out in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            whole = original.generate(
                ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert whole[0, len(prompt) :].tolist() == out


def test_teacher_forced_logits_are_hugging_faces(original: nn.Module, loaded: LoadedModel, backend: Backend) -> None:
    ids = prompt_of(250)
    expected = hf_logits(original, ids)
    for chunk in (64, 100, 512):
        llm = make(loaded, backend, max_num_batched_tokens=chunk)
        rows = 0
        for start, logits in llm.engine.teacher_forced(ids, 120):
            assert logits.dtype == torch.float32
            # float32 sums in another order (1e-5), save where that tips the rounding of one key element (2**-8)
            torch.testing.assert_close(logits, expected[start : start + len(logits)], atol=0.02, rtol=0)
            rows += len(logits)
        assert rows == 130
        assert_idle(llm)
    with pytest.raises(RequestError, match="first is 250"):
        llm.engine.teacher_forced(ids, 250)


# What happens around a request must not show


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_batch_and_chunk_do_not_matter(loaded: LoadedModel, backend: Backend, dtype: str) -> None:
    expected = [tokens(make(loaded, backend, dtype), [p])[0] for p in PROMPTS]
    for chunk in (64, 512, 4096):
        assert tokens(make(loaded, backend, dtype, max_num_batched_tokens=chunk), PROMPTS) == expected


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_preemption_does_not_matter(packed: LoadedModel, dtype: str) -> None:
    """With our own kernels: the reference makes no promise about last bits."""
    backend = default_backend()
    params = [dataclasses.replace(GREEDY, max_tokens=100), SamplingParams(seed=7, max_tokens=100, ignore_eos=True)] * 3
    params[3] = dataclasses.replace(params[3], presence_penalty=1.0, repetition_penalty=1.2)
    prompts = [prompt_of(100, i) for i in range(6)]
    large = make(packed, backend, dtype)
    small = make(packed, backend, dtype, frames=large.engine.pool.layout.frames_of(160) * 2)
    assert tokens(small, prompts, params) == tokens(large, prompts, params)
    assert small.engine.stats.preemptions > 0
    assert large.engine.stats.preemptions == 0


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_the_prefix_cache_does_not_matter(loaded: LoadedModel, backend: Backend, dtype: str) -> None:
    shared = prompt_of(200)
    prompts = [shared + prompt_of(20, i) for i in range(3)] + [shared[:128], shared[:129]]
    off = make(loaded, backend, dtype, enable_prefix_caching=False)
    on = make(loaded, backend, dtype)
    expected = [tokens(off, [p])[0] for p in prompts]
    cached = []
    for prompt, want in zip(prompts, expected, strict=True):
        output = on.generate([prompt], GREEDY)[0]
        assert output.outputs[0].token_ids == want
        cached.append(output.num_cached_tokens)
    assert cached == [0, 192, 192, 64, 128]
    assert off.engine.stats.cached_tokens == 0


def test_a_salt_keeps_caches_apart(loaded: LoadedModel, backend: Backend) -> None:
    engine = make(loaded, backend).engine
    cached = []
    for salt in ("a", "b", "a"):
        engine.add_request(prompt_of(150), GREEDY, salt=salt)
        while engine.has_unfinished():
            last = engine.step()
        cached.append(last[-1].num_cached_tokens)
    assert cached == [0, 0, 128]


def test_sampling_depends_on_the_seed_alone(loaded: LoadedModel, backend: Backend) -> None:
    params = [SamplingParams(seed=i, max_tokens=20, temperature=1.5, top_p=0.95, ignore_eos=True) for i in range(8)]
    llm = make(loaded, backend)
    together = tokens(llm, PROMPTS, params)
    assert [tokens(llm, [p], q)[0] for p, q in zip(PROMPTS, params, strict=True)] == together
    assert tokens(llm, PROMPTS, params[::-1]) != together


def test_n_sequences_of_one_prompt(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    params = SamplingParams(n=3, seed=1, max_tokens=30, temperature=2.0, ignore_eos=True)
    output = llm.generate([prompt_of(150)], params)[0]
    texts = {o.text for o in output.outputs}
    assert len(texts) == 3
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert output.outputs[0].token_ids == tokens(llm, [prompt_of(150)], dataclasses.replace(params, n=1))[0]
    # the prompt was computed once; the others recompute only what lies in its open page
    fresh = make(loaded, backend)
    fresh.generate([prompt_of(150)], params)
    assert fresh.engine.stats.computed_tokens == 150 + 2 * (150 - 128) + 3 * 29
    assert_idle(fresh)


# The end of an answer


# Requests that cannot be served


# What a caller sees


def test_streamed_pieces_make_up_the_result(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend, max_num_seqs=3)
    pieces: dict[tuple[int, int], list] = {}
    params = [SamplingParams(seed=i, n=1 + i % 2, max_tokens=15, stop=["w5 w", "w60"], logprobs=2) for i in range(8)]
    results = llm.generate(PROMPTS, params, on_token=lambda i, d: pieces.setdefault((i, d.index), []).append(d))
    assert len(pieces) == 12
    for (index, part), deltas in pieces.items():
        output = results[index].outputs[part]
        assert "".join(d.text for d in deltas) == output.text
        assert [t for d in deltas for t in d.token_ids] == output.token_ids
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == output.finish_reason
        assert len(output.logprobs or []) == len(output.token_ids)
        assert "w60" not in output.text
        if output.finish_reason == "length":
            # As the text goes on after the prompt, the space before its first word included.
            before = results[index].prompt_token_ids
            whole = llm.tokenizer.decode(before + output.token_ids, skip_special_tokens=True)
            assert whole == llm.tokenizer.decode(before, skip_special_tokens=True) + output.text


@pytest.mark.parametrize("chunk", [64, 512])
def test_logprobs_of_prompt_and_answer(original: nn.Module, loaded: LoadedModel, backend: Backend, chunk: int) -> None:
    llm = make(loaded, backend, max_num_batched_tokens=chunk)
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=1)
    prompts = [prompt_of(150), prompt_of(20, 1)]
    for _ in range(2):  # the second time the prefix cache would know the prompt
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            out = output.outputs[0].token_ids
            exact = torch.log_softmax(hf_logits(original, prompt + out), -1)
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(prompt)
            assert output.prompt_logprobs[0] is None
            entries = [*output.prompt_logprobs[1:], *(output.outputs[0].logprobs or [])]
            for position, entry in enumerate(entries, start=1):
                token = (prompt + out)[position]
                assert entry is not None
                assert entry[token].logprob == pytest.approx(float(exact[position - 1, token]), abs=0.02)
                assert len(entry) <= 4
    assert_idle(llm)


def test_text_prompts_and_one_prompt_alone(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    ids = PROMPTS[0]
    text = " ".join(f"w{t}" for t in ids)
    found = [llm.generate(p, GREEDY)[0] for p in (text, ids, [text], [ids])]
    assert [f.prompt for f in found] == [text, None, text, None]
    assert [f.prompt_token_ids for f in found] == [ids] * 4
    assert len({f.outputs[0].text for f in found}) == 1
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate(text)[0].outputs[0].token_ids) <= 16
    with pytest.raises(ConfigError, match="2 sampling parameters for 3 prompts"):
        llm.generate([ids] * 3, [GREEDY] * 2)


def test_chat_uses_the_models_template(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "w5"}], GREEDY)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
        "{% for m in messages %}<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    llm = make(dataclasses.replace(loaded, tokenizer=tokenizer), backend)
    one = [{"role": "user", "content": "w5 w6"}]
    assert llm.chat(one, GREEDY)[0].prompt_token_ids == [1, 5, 6, 9]
    two = llm.chat([one, [*one, {"role": "assistant", "content": "w7"}]], GREEDY)
    assert [o.prompt_token_ids for o in two] == [[1, 5, 6, 9], [1, 5, 6, 1, 7, 9]]
    with pytest.raises(RequestError, match="no such role"):
        llm.chat([{"role": "bad", "content": "w5"}], GREEDY)


def test_statistics(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    tokens(llm, PROMPTS)
    stats = llm.engine.stats
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.generated_tokens == 24 * len(PROMPTS)
    assert stats.computed_tokens == stats.prompt_tokens - stats.cached_tokens + 23 * len(PROMPTS)
    assert stats.finished == {"length": len(PROMPTS)}
    assert all(seconds > 0 for seconds in stats.seconds.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 5000}, "max_model_len is 5000"),
        ({"kv_cache_dtype": "int99"}, "int99"),
        ({"kv_cache_memory": "1KiB"}, "1 KiB"),
        ({"kv_cache_memory": "lots"}, "lots"),
        ({"kv_cache_memory": 0}, "0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    ],
)
def test_bad_options_are_named(loaded: LoadedModel, backend: Backend, options: dict, message: str) -> None:
    with pytest.raises(KVBitsError, match=message):
        LLM(loaded, backend=backend, **options)


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        kvbits.Nothing  # noqa: B018
    assert set(kvbits.__all__) <= set(dir(kvbits))
    for name in kvbits.__all__:
        assert getattr(kvbits, name) is not None
