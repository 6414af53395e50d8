"""Models with recurrent layers and a kvbits cache in ``generate``, against transformers' own caches."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.hugging_face import hugging_face_model, left_padded
from helpers.tiny import HYBRIDS, tiny_model
from helpers.tiny_engine import one_thread
from transformers import DynamicCache

from kvbits.errors import CacheError, OutOfPages, UnsupportedError
from kvbits.hf import QuantizedCache

__all__ = ["one_thread"]

GREEDY = {"do_sample": False, "eos_token_id": None}
SOME = ("qwen3_next", "lfm2", "falcon_h1")
"""States beside attention and alone, of convolutions only and of both kinds."""


def cache_of(model: torch.nn.Module, dtype: str = "int4", memory: str = "8MiB") -> QuantizedCache:
    return QuantizedCache(model, dtype, kv_cache_memory=memory)


@pytest.mark.parametrize("family", HYBRIDS)
def test_sixteen_bit_generation_is_that_of_the_librarys_own_cache(family: str) -> None:
    inputs = left_padded([110, 90, 5])
    model = hugging_face_model(family)
    library = DynamicCache(config=model.config)
    expected = model.generate(**inputs, past_key_values=library, max_new_tokens=70, **GREEDY)
    cache = cache_of(model, "bf16")
    assert torch.equal(model.generate(**inputs, past_key_values=cache, max_new_tokens=70, **GREEDY), expected)
    assert cache.get_seq_length() == 110 + 69
    cache._store.pages.check()


@pytest.mark.parametrize("family", SOME)
def test_beam_search_is_that_of_the_librarys_own_cache(family: str) -> None:
    inputs = left_padded([60, 41])
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 40, **GREEDY}
    model = hugging_face_model(family)
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    cache = cache_of(model, "bf16")
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)
    cache.reset()
    assert cache.nbytes == 0


@pytest.mark.parametrize("family", SOME)
def test_copies_rows_and_turns(family: str) -> None:
    """What :mod:`transformers` does to a cache between two calls, each compared with a cache that never saw it."""
    model = tiny_model(family)
    ids = left_padded([100])["input_ids"]
    ends = torch.tensor([[5, 6], [7, 8]])

    def fresh(rows: torch.Tensor) -> torch.Tensor:
        cache = cache_of(model)
        model(rows[:, :100], past_key_values=cache)
        return model(rows[:, 100:], past_key_values=cache).logits

    with torch.inference_mode():
        right = torch.cat([fresh(torch.cat([ids, end[None]], 1)) for end in ends])
        base = cache_of(model)
        model(ids, past_key_values=base)
        twins = [copy.deepcopy(base) for _ in ends]
        got = torch.cat([model(end[None], past_key_values=twin).logits for end, twin in zip(ends, twins, strict=True)])
        torch.testing.assert_close(got, right, rtol=2e-3, atol=2e-3)
        base.batch_repeat_interleave(2)
        torch.testing.assert_close(model(ends, past_key_values=base).logits, right, rtol=2e-3, atol=2e-3)
        base.reorder_cache(torch.tensor([1, 0]))
        base.batch_select_indices(torch.tensor([False, True]))
        twin = twins[0]
        got, right = (model(ends[1:], past_key_values=cache).logits for cache in (base, twin))
        torch.testing.assert_close(got, right, rtol=2e-3, atol=2e-3)
        base.reset()  # and then another number of rows
        model(left_padded([9, 9, 9])["input_ids"], past_key_values=base)
        assert base.batch_size == 3


def test_states_are_counted() -> None:
    model = tiny_model("bamba")
    cache = cache_of(model)
    with torch.inference_mode():
        model(left_padded([70, 70])["input_ids"], past_key_values=cache)
    states = 2 * (192 * 4 * 4 + 8 * 16 * 16 * 4)
    stats, layout = cache._store.pages.stats(), cache._store.pool.layout
    assert cache.nbytes == layout.bytes_of(stats.open + stats.sealed) + 2 * states
    assert cache.is_linear == [True, False, True, False]
    assert (len(cache), cache.is_compileable, cache.is_croppable) == (4, False, False)


@pytest.mark.parametrize("family", SOME)
def test_what_would_take_states_back_is_refused(family: str) -> None:
    model = tiny_model(family)
    ids = left_padded([70])["input_ids"]
    cache = cache_of(model)
    has = "assisted decoding, which takes tokens back, has no place for the states of recurrent layers"
    with pytest.raises(UnsupportedError, match=has):
        cache.activate_past_recording()
    with pytest.raises((UnsupportedError, ValueError), match=f"{has}|not supported with stateful models"):
        model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, max_new_tokens=8, **GREEDY)
    with torch.inference_mode():
        first = model(ids, past_key_values=cache).logits
        with pytest.raises(CacheError, match="cannot take back 3 tokens: the states of recurrent layers do not go"):
            cache.crop(-3)
        assert cache.get_seq_length() == 70
        cache.crop(-70)
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, first)


def test_a_pass_that_failed_leaves_a_cache_to_reset() -> None:
    """Layers before the first attention have gone on by then."""
    model = tiny_model("bamba")
    cache = cache_of(model, "bf16", memory="40KiB")
    ids = left_padded([300])["input_ids"]
    with torch.inference_mode():
        first = model(ids[:, :60], past_key_values=cache).logits
        with pytest.raises(OutOfPages):
            model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match=r"did not come to its end; call cache\.reset\(\) first"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(ids[:, :60], past_key_values=cache).logits, first)
