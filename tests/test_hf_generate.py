"""The ways in which transformers uses a cache: beams, drafts that are taken back, copies, several turns."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.hugging_face import hugging_face_model, left_padded
from helpers.tiny import VOCAB, tiny_model
from transformers import DynamicCache

from kvbits.errors import CacheError
from kvbits.hf import QuantizedCache

GREEDY = {"do_sample": False, "eos_token_id": None}


def cache_of(model: torch.nn.Module, dtype: str = "int4") -> QuantizedCache:
    return QuantizedCache(model, dtype, kv_cache_memory="8MiB")


def noisy(family: str, amount: float) -> torch.nn.Module:
    """A model that drafts what the tiny model says, often but not always."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beam_search_is_that_of_the_librarys_own_cache(family: str) -> None:
    inputs = left_padded([60, 41])
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 80, **GREEDY}
    model = hugging_face_model(family)
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    cache = cache_of(model, "bf16")
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)
    cache._store.pages.check()
    cache.reset()
    assert cache.nbytes == 0


def test_beams_share_the_pages_of_their_prompt() -> None:
    model = tiny_model("llama")
    cache = cache_of(model)
    prompt = left_padded([400])["input_ids"]
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
        alone = cache.nbytes
        cache.batch_repeat_interleave(4)
        assert (cache.batch_size, cache.nbytes) == (4, alone)
        model(torch.tensor([[5], [6], [7], [8]]), past_key_values=cache)
        opens = cache._store.pages.stats().open * cache._store.pool.layout.frame_bytes
        assert cache.nbytes == alone + opens * 3 // 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2-window"])
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_gives_the_tokens_of_unassisted_decoding(family: str, how: str) -> None:
    model = tiny_model(family)
    # the end of the prompt repeats its beginning, so that the lookup finds drafts
    prompt = left_padded([40])["input_ids"].repeat(1, 3)[:, :100]
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 120, **GREEDY}
    expected = model.generate(prompt, past_key_values=cache_of(model), **options)
    lengths: list[int] = []

    class Watched(QuantizedCache):
        def crop(self, tokens_to_remove: int) -> None:
            lengths.append(tokens_to_remove)
            super().crop(tokens_to_remove)

    cache = Watched(model, "int4", kv_cache_memory="8MiB")
    drafts = {"assistant_model": noisy(family, 0.02)} if how == "assistant" else {"prompt_lookup_num_tokens": 10}
    got = model.generate(prompt, past_key_values=cache, **drafts, **options)
    assert any(n < 0 for n in lengths)
    assert len(lengths) < 120  # some drafts were right
    # a step of several rows rounds otherwise than steps of one row: the tokens may part where two are tied, only there
    same = (got.sequences == expected.sequences)[0, 100:].long().cumprod(0).sum().item()
    logits, other = (torch.stack(out.logits)[: same + 1, 0] for out in (got, expected))
    best = other.topk(2).values
    assert same > 50
    assert same == 120 or best[same, 0] - best[same, 1] < 1e-3
    torch.testing.assert_close(logits, other, rtol=0.02, atol=0.02)
    cache._store.pages.check()


def test_a_draft_over_a_page_boundary_is_taken_back_exactly() -> None:
    model = tiny_model("llama")
    tokens = left_padded([140])["input_ids"]
    other = torch.randint(4, VOCAB, (1, 30), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        plain = cache_of(model)
        model(tokens[:, :125], past_key_values=plain)
        expected = model(other, past_key_values=plain).logits
        drafted = cache_of(model)
        drafted.activate_past_recording()
        model(tokens[:, :120], past_key_values=drafted)
        drafted.crop(0)
        model(tokens[:, 120:], past_key_values=drafted)  # fills the page of tokens 64 to 127
        assert drafted.get_seq_length() == 140
        drafted.crop(-15)
        assert drafted.get_seq_length() == 125
        got = model(other, past_key_values=drafted).logits
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    drafted._store.pages.check()


def test_drafted_tokens_see_the_finished_page_as_its_code() -> None:
    model = tiny_model("llama")
    tokens = left_padded([140])["input_ids"]
    with torch.inference_mode():
        plain, drafted = cache_of(model, "int2"), cache_of(model, "int2")
        drafted.activate_past_recording()
        logits = []
        for cache in (plain, drafted):
            model(tokens[:, :120], past_key_values=cache)
            logits.append(model(tokens[:, 120:], past_key_values=cache).logits)
        sealed = cache_of(model, "bf16")
        model(tokens[:, :120], past_key_values=sealed)
        unlike = model(tokens[:, 120:], past_key_values=sealed).logits
    torch.testing.assert_close(*logits, rtol=2e-3, atol=2e-3)
    assert (logits[0] - unlike).abs().max() > 0.1


def test_a_crop_into_a_sealed_page_is_refused_and_changes_nothing() -> None:
    model = tiny_model("llama")
    tokens = left_padded([100])["input_ids"]
    with torch.inference_mode():
        cache = cache_of(model)
        model(tokens, past_key_values=cache)
        with pytest.raises(CacheError, match=r"row 0 .* to 60 tokens: its first 64 are in sealed pages"):
            cache.crop(-40)
        assert cache.get_seq_length() == 100
        cache.crop(-36)  # down to the page boundary
        assert cache.get_seq_length() == 64
        with pytest.raises(CacheError, match="negative"):
            cache.crop(10)
        cache.crop(-64)  # all of it
        assert (cache.get_seq_length(), cache.batch_size) == (0, 1)
        again = model(tokens, past_key_values=cache).logits
        torch.testing.assert_close(again, model(tokens, past_key_values=cache_of(model)).logits)


def test_a_recorded_step_of_many_pages_can_be_cropped_by_a_page() -> None:
    model = tiny_model("llama")
    inputs = left_padded([200, 150])
    tail = torch.tensor([[9, 10, 11], [12, 13, 14]])
    with torch.inference_mode():
        cache = cache_of(model)
        cache.activate_past_recording()
        model(**inputs, past_key_values=cache)
        cache.crop(-64)
        short = cache_of(model)
        mask = inputs["attention_mask"][:, :136]
        model(inputs["input_ids"][:, :136], attention_mask=mask, past_key_values=short)
        mask = torch.cat([mask, torch.ones_like(tail)], 1)
        got = model(tail, attention_mask=mask, past_key_values=cache).logits
        expected = model(tail, attention_mask=mask, past_key_values=short).logits
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_copies_of_a_cached_prompt_share_it_and_go_their_own_way() -> None:
    model = tiny_model("gemma3_text")
    prompt = left_padded([200])["input_ids"]
    ends = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])]
    with torch.inference_mode():
        base = cache_of(model)
        model(prompt, past_key_values=base)
        alone = base.nbytes
        answers = []
        for end in ends:
            twin = copy.deepcopy(base)
            assert base.nbytes == alone
            ids = torch.cat([prompt, end], 1)
            answers.append(model.generate(ids, past_key_values=twin, max_new_tokens=70, **GREEDY))
            del twin
        assert base.get_seq_length() == 200
        assert base.nbytes == alone
        for end, answer in zip(ends, answers, strict=True):
            ids = torch.cat([prompt, end], 1)
            fresh = model.generate(ids, past_key_values=cache_of(model), max_new_tokens=70, **GREEDY)
            assert torch.equal(answer, fresh)


def test_several_turns_continue_one_cache() -> None:
    model = tiny_model("qwen3")
    cache = cache_of(model)
    ids = left_padded([50])["input_ids"]
    for turn in range(3):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY)
        ids = torch.cat([ids, torch.full((1, 5), 10 + turn)], 1)
    fresh = cache_of(model)
    with torch.inference_mode():
        expected = model(ids, past_key_values=fresh).logits[0, -6:]
        got = model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits[0]
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_rows_can_be_reordered_and_selected() -> None:
    model = tiny_model("mistral")
    inputs = left_padded([90, 70, 66])
    order = [2, 0, 2]
    step, ones = torch.tensor([[5], [6], [7]]), torch.ones(3, 1, dtype=torch.long)
    with torch.inference_mode():
        cache, other = cache_of(model), cache_of(model)
        model(**inputs, past_key_values=cache)
        cache.reorder_cache(torch.tensor(order))
        shuffled = {k: v[order] for k, v in inputs.items()}
        model(**shuffled, past_key_values=other)
        mask = torch.cat([shuffled["attention_mask"], ones], 1)
        got = model(step, attention_mask=mask, past_key_values=cache).logits
        expected = model(step, attention_mask=mask, past_key_values=other).logits
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
        cache.batch_select_indices(torch.tensor([False, True, True]))
        assert cache.batch_size == 2
        got = model(step[1:], attention_mask=torch.cat([mask, ones], 1)[1:], past_key_values=cache).logits
        expected = model(step, attention_mask=torch.cat([mask, ones], 1), past_key_values=other).logits
    torch.testing.assert_close(got, expected[1:], rtol=2e-3, atol=2e-3)
    cache._store.pages.check()
