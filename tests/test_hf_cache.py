"""The cache as an object: what it costs, what transformers asks it, and what it refuses."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from helpers.hugging_face import left_padded
from helpers.tiny import tiny_model
from transformers import Cache, T5Config, T5ForConditionalGeneration

from kvbits.codecs import parse_policy
from kvbits.codecs.policy_file import save_policy
from kvbits.errors import CacheError, ConfigError, OutOfPages, UnsupportedError
from kvbits.hf import QuantizedCache
from kvbits.models.load import wrap

IDS = left_padded([70])["input_ids"]


def test_it_says_what_transformers_asks() -> None:
    model = tiny_model("gemma2")
    cache = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    assert isinstance(cache, Cache)
    assert (len(cache), cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (3, 0, -1, False)
    assert cache.is_sliding == [True, False, True]
    assert [cache.get_max_length(i) for i in range(3)] == [40, -1, 40]
    assert (cache.is_compileable, cache.is_croppable) == (False, True)
    cache.activate_past_recording()
    assert cache.is_recording_past(1)
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (70, 1, True)
    assert cache.get_mask_sizes(5, 0) == cache.get_mask_sizes(5, 1) == (75, 0)
    assert "int8" in repr(cache)
    with pytest.raises(UnsupportedError, match="crop works on the whole cache"):
        cache.layers[0].crop(-1)


def test_memory_is_that_of_pages_in_use_and_comes_back() -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    used = {}
    for dtype in ("bf16", "int8", "int4"):
        cache = QuantizedCache(model, dtype, kv_cache_memory="64MiB")
        with torch.inference_mode():
            model(torch.randint(4, 97, (1, 64 * 6 + 5)), past_key_values=cache)
        layout = cache._store.pool.layout
        used[dtype] = cache.nbytes
        assert used[dtype] == layout.frames_of(64 * 6 + 5) * layout.frame_bytes
        store = cache._store
        del cache
        gc.collect()
        assert store.pages.stats().free == store.pages.num_frames
    assert used["bf16"] / used["int8"] > 1.5
    assert used["bf16"] / used["int4"] > 2.0


def test_a_policy_string_and_a_policy_directory(tmp_path: Path) -> None:
    model = tiny_model("llama")
    loaded = wrap(model, None, "llama")
    save_policy(tmp_path, parse_policy("0:int8,1-2:int8/int4", 3), loaded.geometry, loaded.fingerprint, {})
    logits = []
    for dtype in ("0:int8,1-2:int8/int4", tmp_path, str(tmp_path), f"policy:{tmp_path}"):
        cache = QuantizedCache(model, dtype, kv_cache_memory="4MiB")
        with torch.inference_mode():
            logits.append(model(IDS, past_key_values=cache).logits)
    for other in logits[1:]:
        assert torch.equal(other, logits[0])
    with pytest.raises(ConfigError, match="calibrated for"):
        QuantizedCache(tiny_model("llama", seed=5), tmp_path)


def test_wrong_arguments_are_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="unknown KV cache dtype 'int7'"):
        QuantizedCache(model, "int7")
    with pytest.raises(ConfigError, match="not a size"):
        QuantizedCache(model, "int8", kv_cache_memory="lots")
    both = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=16, d_ff=16, num_layers=1, num_heads=1, vocab_size=10))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        QuantizedCache(both)
    with pytest.raises(UnsupportedError, match="the model itself, not LlamaConfig"):
        QuantizedCache(model.config)


def test_a_model_that_was_switched_says_how_to_go_on() -> None:
    model = tiny_model("llama")
    before = model(IDS).logits
    cache = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    with pytest.raises(UnsupportedError, match="past_key_values=cache"):
        model(IDS)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, before)
    with pytest.raises(UnsupportedError, match=r"attention is 'sdpa'.*set_attn_implementation"):
        model(IDS, past_key_values=cache)


def test_a_cache_of_another_model_is_refused() -> None:
    model = tiny_model("llama")
    other = QuantizedCache(tiny_model("qwen3"), "int8", kv_cache_memory="4MiB")
    QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    with pytest.raises(CacheError, match="2 KV heads of sizes 16 and 16; the cache was made for 2 of 32 and 32"):
        model(IDS, past_key_values=other)


@torch.inference_mode()
def test_masks_that_it_cannot_follow_are_refused() -> None:
    model = tiny_model("mistral")
    inputs = left_padded([70, 60])
    cache = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    model(**inputs, past_key_values=cache)
    step = torch.tensor([[5], [6]])
    with pytest.raises(UnsupportedError, match="differs from the one"):
        model(step, past_key_values=cache)
    hidden = torch.cat([inputs["attention_mask"], torch.ones(2, 1)], 1).long()
    hidden[0, 10] = 0
    with pytest.raises(UnsupportedError, match="differs from the one"):
        model(step, attention_mask=hidden, past_key_values=cache)
    with pytest.raises(UnsupportedError, match=r"shape \(2, 1, 1, 71\)"):
        model(step, attention_mask=torch.zeros(2, 1, 1, 71), past_key_values=cache)
    with pytest.raises(CacheError, match="2 sequences; the model was called with 1"):
        model(step[:1], past_key_values=cache)
    gap = torch.ones(2, 3, dtype=torch.long)
    gap[0, 1] = 0
    with pytest.raises(UnsupportedError, match="padding between tokens"):
        model(torch.full((2, 3), 5), attention_mask=gap, past_key_values=QuantizedCache(model, "int8"))
    assert cache.get_seq_length() == 70  # none of these changed it
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    model(step, attention_mask=mask, past_key_values=cache)


@torch.inference_mode()
def test_a_full_pool_is_said_and_the_cache_can_be_reset() -> None:
    model = tiny_model("llama")
    cache = QuantizedCache(model, "int8", kv_cache_memory=60_000)
    with pytest.raises(OutOfPages, match="Give it more kv_cache_memory"):
        model(torch.full((4, 400), 5), past_key_values=cache)
    with pytest.raises(CacheError, match=r"call cache\.reset\(\)"):
        model(IDS, past_key_values=cache)
    cache.reset()
    assert cache.nbytes == 0
    model(IDS, past_key_values=cache)


@torch.inference_mode()
def test_a_failed_pass_is_not_taken_for_a_whole_one() -> None:
    model = tiny_model("llama")
    cache = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    layer = model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        model(IDS, past_key_values=cache)
    handle.remove()
    with pytest.raises(CacheError, match="did not come to its end"):
        model(IDS, past_key_values=cache)
    cache.reset()
    fresh = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    assert torch.equal(model(IDS, past_key_values=cache).logits, model(IDS, past_key_values=fresh).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_a_cache_cannot_do_is_refused_by_name(family: str) -> None:
    model = tiny_model(family)
    cache = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    inputs = left_padded([20, 12])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for arguments in ({"use_cache": False}, {"output_attentions": True, "return_dict_in_generate": True}):
        with pytest.raises(UnsupportedError, match=next(iter(arguments))):
            model.generate(**inputs, past_key_values=cache, **options, **arguments)
        with pytest.raises(UnsupportedError, match=next(iter(arguments))):
            model.get_decoder()(**inputs, past_key_values=cache, **arguments)
    assert cache.get_seq_length() == 0  # nothing was stored
    # a second cache on the same model adds no second look
    again = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    assert len(model.get_decoder()._forward_pre_hooks) == 1
    want = model.generate(**inputs, past_key_values=again, **options)
    model.set_attn_implementation("eager")
    # without a kvbits cache the model does all of it
    got = model.generate(**inputs, use_cache=False, output_attentions=True, return_dict_in_generate=True, **options)
    assert got.sequences.shape == want.shape
    assert got.attentions[0][0].shape[-1] == 20
    model.set_attn_implementation("kvbits-cache")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(**inputs, past_key_values=cache)


@torch.inference_mode()
def test_hidden_states_are_the_models_own() -> None:
    model = tiny_model("llama")
    cache = QuantizedCache(model, "int8", kv_cache_memory="4MiB")
    want = model(IDS, past_key_values=cache).logits
    cache.reset()
    got = model(IDS, past_key_values=cache, output_hidden_states=True)
    assert len(got.hidden_states) == 4
    assert torch.equal(got.hidden_states[0], model.get_input_embeddings()(IDS))
    assert torch.equal(model.lm_head(got.hidden_states[-1]), want)
    assert torch.equal(got.logits, want)


def test_a_compiled_model_gives_what_it_gives_uncompiled() -> None:
    model = tiny_model("llama")
    cache = QuantizedCache(model, "int4", kv_cache_memory="4MiB")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        want = [model(part, past_key_values=cache).logits for part in (IDS, IDS[:, :1])]
        cache.reset()
        got = [compiled(part, past_key_values=cache).logits for part in (IDS, IDS[:, :1])]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
