"""The engine on tiny models: the same answers whatever happens around a request, and none lost."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from helpers.tiny import VOCAB, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import kvbits
from kvbits import LLM, SamplingParams
from kvbits.errors import ConfigError, KVBitsError, RequestError
from kvbits.kernels import Backend, default_backend
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models import LoadedModel
from kvbits.models.load import wrap
from kvbits.models.packed import pack_linears

CONTEXT = 1024
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "default"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return ReferenceBackend() if request.param == "reference" else default_backend()


def eager_16bit(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object
) -> object:
    """The family's own eager attention on keys and values rounded as a 16-bit cache rounds them."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key.bfloat16().float(), value.bfloat16().float(), mask, **kwargs)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    AttentionInterface.register("eager-16bit-kv", eager_16bit)
    AttentionMaskInterface.register("eager-16bit-kv", eager_mask)
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    model.set_attn_implementation("eager-16bit-kv")
    return model


@pytest.fixture(scope="module")
def loaded(original: nn.Module) -> LoadedModel:
    return wrap(copy.deepcopy(original), tiny_tokenizer(), "tiny-llama")


@pytest.fixture(scope="module")
def packed(original: nn.Module) -> LoadedModel:
    """The same model in bfloat16 with packed layers, whose rounding does not depend on a step's rows.

    A rounding of the last bit can tip a 4-bit code or an 8-bit query, and so a sampled token: what compares tokens over
    different batches needs a model that gives the same bits in each.
    """
    loaded = wrap(copy.deepcopy(original).to(torch.bfloat16), tiny_tokenizer(), "tiny-llama")
    pack_linears(loaded.model)
    reason = loaded.depends_on_rows()
    if reason:
        pytest.skip(reason)
    return loaded


def make(loaded: LoadedModel, backend: Backend, dtype: str = "bf16", frames: int = 400, **options) -> LLM:
    """An LLM whose pool has ``frames`` frames (8 KiB each: 64 tokens x 3 layers x 2 heads x ..., rounded up)."""
    one = LLM(loaded, kv_cache_dtype=dtype, kv_cache_memory=1 << 24, backend=backend).engine.pool.layout.frame_bytes
    llm = LLM(loaded, kv_cache_dtype=dtype, kv_cache_memory=frames * one, backend=backend, progress=False, **options)
    assert llm.engine.pool.num_frames == frames
    # What no one wrote must not be read: every parameter of an unwritten page is a NaN.
    llm.engine.pool.buffer.fill_(0xFF)
    return llm


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt_of(n, n) for n in (5, 63, 64, 65, 130, 200, 1, 300)]


def tokens(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams] = GREEDY
) -> list[list[int]]:
    outputs = llm.generate(prompts, params)
    for output in outputs:
        assert output.error is None
    assert_idle(llm)
    return [o.outputs[0].token_ids for o in outputs]


def assert_idle(llm: LLM) -> None:
    engine = llm.engine
    assert not engine.has_unfinished()
    engine.pages.check()
    assert engine.pages.sequences() == []
    assert engine.pages.available() == engine.pool.num_frames


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


def words(llm: LLM, prompt: list[int], **options) -> tuple[str, list[int], object]:
    # special tokens leave no text: without them, words and tokens correspond
    options = {"logit_bias": dict.fromkeys(range(4), -100.0), **options}
    output = llm.generate([prompt], dataclasses.replace(GREEDY, **options))[0].outputs[0]
    return output.text, output.token_ids, (output.finish_reason, output.stop_reason)


def test_stop_strings_and_stop_tokens(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    text, ids, end = words(llm, PROMPTS[4])
    assert end == ("length", None)
    parts = text.split()
    assert len(parts) == len(ids) == 24
    new = next(i for i in range(5, 24) if parts[i] not in parts[:i])
    cut = text.index(parts[new])
    # the whole word, a string over two words, and one that only begins like the text
    assert words(llm, PROMPTS[4], stop=parts[new]) == (text[:cut], ids[: new + 1], ("stop", parts[new]))
    pair = f"{parts[new - 1][-1]} {parts[new][0]}"
    shown, kept, end = words(llm, PROMPTS[4], stop=[pair, "nowhere"])
    assert shown == text[: text.index(pair)]
    assert end == ("stop", pair)
    assert len(kept) <= new + 1
    assert words(llm, PROMPTS[4], stop=f"{parts[-1]} and more") == (text, ids, ("length", None))
    shown, kept, end = words(llm, PROMPTS[4], stop_token_ids=[ids[new]])
    assert (shown.split(), kept, end) == (parts[:new], ids[: new + 1], ("stop", ids[new]))
    assert_idle(llm)


def test_the_models_end_token(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    bias = {2: 100.0}
    assert words(llm, PROMPTS[0], logit_bias=bias, ignore_eos=False) == ("", [2], ("stop", 2))
    assert words(llm, PROMPTS[0], logit_bias=bias, max_tokens=3)[1:] == ([2, 2, 2], ("length", None))


def test_the_context_ends_an_answer(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend, max_model_len=100)
    output = llm.generate([prompt_of(90)], dataclasses.replace(GREEDY, max_tokens=None))[0].outputs[0]
    assert len(output.token_ids) == 10
    assert (output.finish_reason, output.note) == ("length", "the context of 100 tokens is full")


def test_the_pool_ends_an_answer_that_outgrows_it(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend, "int8", frames=8)
    output = llm.generate([prompt_of(100)], dataclasses.replace(GREEDY, max_tokens=900))[0].outputs[0]
    assert output.finish_reason == "length"
    assert "KV cache" in (output.note or "")
    assert 100 + len(output.token_ids) == llm.engine.limits.pool + 1
    assert_idle(llm)


# Requests that cannot be served


def test_a_bad_prompt_is_an_error_for_itself_only(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend, "int8", frames=10)
    bad = {
        1: (prompt_of(2000), "context is 1024"),
        3: ([], "no tokens"),
        4: (prompt_of(1000), "KV cache of"),
        5: ([5, VOCAB], f"token {VOCAB}"),
    }
    prompts = [bad[i][0] if i in bad else prompt_of(50, i) for i in range(7)]
    outputs = llm.generate(prompts, GREEDY)
    expected = make(loaded, backend, "int8")
    for i, output in enumerate(outputs):
        if i in bad:
            assert bad[i][1] in (output.error or "")
            assert output.outputs[0].finish_reason == "error"
        else:
            assert output.error is None
            assert output.outputs[0].token_ids == tokens(expected, [prompts[i]])[0]
    assert_idle(llm)


class Poisoned(LoadedModel):
    """Fails on a step that holds token 96."""

    def forward(self, input_ids: Tensor, positions: Tensor, step, logits_rows: Tensor) -> Tensor:
        if (input_ids == 96).any():
            raise RuntimeError("poison")
        return super().forward(input_ids, positions, step, logits_rows)


class Diverging(LoadedModel):
    """Gives NaN for a row that follows token 95."""

    def forward(self, input_ids: Tensor, positions: Tensor, step, logits_rows: Tensor) -> Tensor:
        logits = super().forward(input_ids, positions, step, logits_rows)
        return logits.masked_fill((input_ids[logits_rows] == 95)[:, None], float("nan"))


def test_a_failing_step_ends_only_the_request_that_fails(loaded: LoadedModel, backend: Backend) -> None:
    bias = dataclasses.replace(GREEDY, logit_bias={95: -100, 96: -100})
    prompts = [[t if t < 95 else 4 for t in p] for p in PROMPTS]
    expected = tokens(make(loaded, backend), prompts, bias)
    fields = {f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
    for kind, token, message in ((Poisoned, 96, "poison"), (Diverging, 95, "not finite")):
        llm = make(kind(**fields), backend)
        poisoned = [*prompts[:2], [7, token], *prompts[2:], [*prompt_of(80), token]]
        outputs = llm.generate(poisoned, bias)
        for i in (2, 9):
            assert message in (outputs[i].error or "")
            assert outputs[i].outputs[0].finish_reason == "error"
        good = [o.outputs[0].token_ids for i, o in enumerate(outputs) if i not in (2, 9)]
        assert good == expected
        assert_idle(llm)


def test_abort_frees_pages_at_once(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    engine = llm.engine
    first = engine.add_request(prompt_of(100), dataclasses.replace(GREEDY, max_tokens=500, n=2))
    second = engine.add_request(prompt_of(70, 1), GREEDY)
    for _ in range(4):
        engine.step()
    assert engine.load().running == 3
    assert engine.load().usage > 0
    engine.abort(first)
    engine.abort("no such request")
    assert engine.load().running == 1
    last = [d for d in engine.step() if d.request_id == first]
    assert [(d.index, d.finish_reason) for d in last] == [(0, "abort"), (1, "abort")]
    count = 0
    while engine.has_unfinished():
        count += sum(d.request_id == first for d in engine.step())
    assert count == 0
    assert engine.add_request(prompt_of(3), GREEDY, request_id=second) == second
    with pytest.raises(RequestError, match="already running"):
        engine.add_request(prompt_of(3), GREEDY, request_id=second)
    engine.abort(second)
    engine.step()
    assert_idle(llm)


def test_a_deadline_ends_a_request(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)
    engine = llm.engine
    late = engine.add_request(prompt_of(10), dataclasses.replace(GREEDY, max_tokens=900), timeout=0.05)
    early = engine.add_request(prompt_of(10, 1), GREEDY, timeout=1000.0)
    engine.step()
    time.sleep(0.06)
    last = {}
    while engine.has_unfinished():
        for delta in engine.step():
            last[delta.request_id] = delta
    assert (last[late].finish_reason, last[late].error) == ("abort", "the request's deadline has passed")
    assert last[early].finish_reason == "length"
    assert_idle(llm)


def test_an_interrupted_call_leaves_nothing_behind(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend)

    def interrupt(index: int, delta: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, on_token=interrupt)
    assert llm.engine.pages.sequences() == []
    assert tokens(llm, PROMPTS) == tokens(make(loaded, backend), PROMPTS)


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
        ({"kv_cache_memory": "1KiB"}, "1024 bytes"),
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
