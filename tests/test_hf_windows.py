"""Windows and chunks in the cache for transformers: pages behind them are given back, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.hugging_face import hugging_face_model, left_padded
from helpers.tiny import tiny_model
from helpers.tiny_engine import one_thread
from helpers.zoo import LLAMA4, SHARING
from transformers import DynamicCache

from kvbits.codecs import PoolLayout
from kvbits.errors import CacheError, OutOfPages
from kvbits.hf import QuantizedCache
from kvbits.hf.store import Store
from kvbits.pages import PageManager

__all__ = ["one_thread"]

GREEDY = {"do_sample": False, "eos_token_id": None}
CHANGES = {**SHARING, "llama4_text": LLAMA4}
FAMILIES = ("gemma3_text", "mistral", "qwen3-window", *CHANGES)
"""Windows beside full layers, alone, and of 100 tokens; layers that share keys and values; chunks of 50."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every pass, whatever no sequence names holds numbers that are none."""
    prepare = Store.copy_pages

    def copy_pages(store: Store) -> None:
        prepare(store)
        pages, named = store.pages, set()
        for sequence in pages.sequences():
            step = pages.slice(sequence) if pages.reserved(sequence) else pages.stored(sequence)
            named |= {*step.sealed, *step.sink, *step.head, *step.tail}
        store.pool.buffer[[frame for frame in range(pages.num_frames) if frame not in named]] = 0xFF

    monkeypatch.setattr(Store, "copy_pages", copy_pages)


def cache_of(model: torch.nn.Module, dtype: str = "int4", memory: str | int = "2MiB") -> QuantizedCache:
    return QuantizedCache(model, dtype, kv_cache_memory=memory)


def held(cache: QuantizedCache, lengths: list[int]) -> int:
    """Bytes of what rows of so many tokens must hold, with every page of the layers that see all."""
    layout = cache._store.pool.layout
    assert any(group.kept is not None for group in layout.groups)
    return sum(layout.session_bytes(length) for length in lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_the_librarys_own_cache(family: str) -> None:
    """Rows of several windows and of less than one, padded on the left; several windows more are written."""
    inputs, new = left_padded([300, 170, 9]), 150
    model = hugging_face_model(family, **CHANGES.get(family, {}))
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), max_new_tokens=new, **GREEDY)
    cache = cache_of(model, "bf16")
    got = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **GREEDY)
    assert torch.equal(got, expected)
    cache._store.pages.check()
    lengths = [n + new - 1 for n in (300, 170, 9)]
    assert cache.nbytes == held(cache, lengths)
    pool = cache._store.pool
    kept = PoolLayout.of(pool.geometry, pool.policy, free_windows=False)
    assert cache.nbytes < 0.75 * sum(kept.session_bytes(length) for length in lengths)
    cache.reset()
    assert cache.nbytes == 0


def test_memory_stays_what_the_windows_see() -> None:
    """Of windows alone it does not grow with the text, and a pool of that size is enough for any length."""
    model = tiny_model("mistral")
    cache = cache_of(model, "int8")
    tokens = left_padded([400])["input_ids"]
    sizes = []
    with torch.inference_mode():
        for part in tokens.split(20, dim=1):
            model(part, past_key_values=cache)
            sizes.append(cache.nbytes)
        assert max(sizes[4:]) == sizes[4] == held(cache, [100])
        small = cache_of(model, "int8", memory=sizes[4] + cache._store.pool.layout.frame_bytes)
        with pytest.raises(OutOfPages, match=r"in parts, generate\(prefill_chunk_size=512\)"):
            model(tokens, past_key_values=small)
        small.reset()
    options = {"max_new_tokens": 100, **GREEDY}
    got = model.generate(tokens, past_key_values=small, prefill_chunk_size=64, **options)
    assert small.get_seq_length() == 499
    assert torch.equal(got, model.generate(tokens, past_key_values=cache_of(model, "int8"), **options))


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "llama4_text"])
def test_a_recorded_pass_of_many_pages_reads_all_of_them(family: str) -> None:
    """And is taken back: to the next page, in the middle of the last 64 tokens, and to the page before."""
    model = tiny_model(family, **CHANGES.get(family, {}))
    inputs, tail = left_padded([330, 262]), torch.tensor([[9, 10, 11], [12, 13, 14]])
    ones = torch.ones_like(tail)
    with torch.inference_mode():
        plain = cache_of(model)
        expected = model(**inputs, past_key_values=plain).logits
        for back in (0, 5, 12, 64):
            cache = cache_of(model, memory=plain._store.pool.layout.frame_bytes * 170)
            cache.activate_past_recording()
            got = model(**inputs, past_key_values=cache).logits
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
            cache.crop(-back)
            cache._store.pages.check()
            short, width = cache_of(model), 330 - back
            mask = inputs["attention_mask"][:, :width]
            model(inputs["input_ids"][:, :width], attention_mask=mask, past_key_values=short)
            mask = torch.cat([mask, ones], 1)
            right = model(tail, attention_mask=mask, past_key_values=short).logits
            again = model(tail, attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(again, right, rtol=2e-3, atol=2e-3)
            cache._batch.settle()
            cache._store.pages.check()
            assert cache.nbytes == short.nbytes
        with pytest.raises(CacheError, match="are in sealed pages"):
            short.crop(-30)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3-window"])
def test_rows_that_part_keep_what_each_of_them_sees(family: str) -> None:
    """Beams share pages until each gives them back; what one leaves behind stays for the other."""
    inputs = left_padded([150, 101])
    model = hugging_face_model(family)
    options = {"num_beams": 3, "max_new_tokens": 140, **GREEDY}
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    cache = cache_of(model, "bf16")
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)
    cache._store.pages.check()
    base = cache_of(model, "bf16")
    ends = torch.randint(4, 97, (1, 130), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        model(inputs["input_ids"][:1], past_key_values=base)
        alone = base.nbytes
        twin = copy.deepcopy(base)
        far = model(ends, past_key_values=twin).logits
        base._store.pages.check()
        assert torch.equal(model(ends, past_key_values=base).logits, far)
        del twin
    assert base.nbytes == held(base, [280]) > alone


def break_runs(pages: PageManager, sequence: int) -> None:
    """Take all free frames but those beside some of ``sequence``'s sealed ones, and as many others as these are."""
    allocator, run = pages._allocator, pages.open_frames
    taken = allocator.take(allocator.free)
    sealed = {frame // run for frame in pages.slice(sequence).sealed if frame >= 0}
    number = next(frame // run for frame in taken if frame // run in sealed)
    beside = [frame for frame in taken if frame // run == number]
    apart = {frame // run: frame for frame in taken if frame // run != number}
    for frame in [*beside, *list(apart.values())[: run - len(beside)]]:
        allocator.release((frame,))
        allocator.put((frame,))
    assert allocator.free == run


def test_pages_that_move_in_the_middle_of_a_pass_are_followed() -> None:
    """Another cache on the pool takes pages between two layers, as one in another thread may."""
    model, ends = tiny_model("gemma3_text"), torch.randint(4, 97, (1, 70), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        own = cache_of(model, "int8")
        model(left_padded([200])["input_ids"], past_key_values=own)
        expected = model(ends, past_key_values=copy.deepcopy(own)).logits
        store, moves = own._store, []

        def move(*_: object) -> None:
            break_runs(store.pages, own._batch.ids()[0])
            before = store.pages.moves
            store.pages.reserve(other := store.open(), 1)
            store.pool.buffer[list(store.pages.slice(other).head)] = 0xFF
            moves.append(store.pages.moves - before)

        handle = model.model.layers[1].register_forward_pre_hook(move)
        got = model(ends, past_key_values=own).logits
        handle.remove()
    assert moves == [1]
    assert torch.equal(got, expected)
