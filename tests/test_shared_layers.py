"""Layers that share another layer's keys and values, and chunked attention, in the engine and in transformers' loop."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers.families import NEW, PROMPT
from helpers.hugging_face import hugging_face_model, left_padded
from helpers.hybrids import answers, prompt
from helpers.serving import engine_of
from helpers.tiny import tiny_config, tiny_model
from helpers.tiny_engine import one_thread
from helpers.zoo import LLAMA4, SHARING
from transformers import DynamicCache

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import ModelGeometry
from kvbits.engine.engine import Engine
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.errors import UnsupportedError
from kvbits.evaluation.layers import measure_layers
from kvbits.hf import QuantizedCache
from kvbits.models import LoadedModel, geometry_of
from kvbits.models.load import wrap

__all__ = ["one_thread"]

FAMILIES = {**SHARING, "llama4_text": LLAMA4}
PROMPTS = [prompt(n, n) for n in (70, 5, 131)]
TOKENS = 65


@cache
def loaded_of(family: str) -> LoadedModel:
    return wrap(tiny_model(family, **FAMILIES[family]), None, family)


@cache
def expected(family: str) -> list[list[int]]:
    model, found = hugging_face_model(family, **FAMILIES[family]), []
    for tokens in PROMPTS:
        out = model.generate(torch.tensor([tokens]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        found.append(out[0, len(tokens) :].tolist())
    return found


def engine(family: str, **changes: object) -> Engine:
    return engine_of(loaded_of(family), **{"kv_cache_dtype": "bf16", "max_num_batched_tokens": 100, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_transformers_own(family: str) -> None:
    """Three at once, prompts in parts, pages behind windows and chunks given back; then from the prefix cache."""
    running = engine(family)
    assert any(group.kept is not None for group in running.pool.layout.groups), "windows or chunks give pages back"
    assert answers(running, PROMPTS, max_tokens=TOKENS) == expected(family)
    before = running.stats.cached_tokens
    assert answers(running, [PROMPTS[2]], max_tokens=TOKENS) == [expected(family)[2]]
    assert running.stats.cached_tokens - before == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_guessed_tokens_that_do_not_hold_leave_nothing(family: str) -> None:
    loaded, right = loaded_of(family), expected(family)
    config = engine(family).config
    guessing = Engine(
        loaded, config, speculative=SpeculativeConfig.of('{"method": "ngram", "num_speculative_tokens": 3}')
    )
    repeated = [*PROMPTS[0], *right[0]]
    plain = answers(engine(family), [repeated], max_tokens=40)
    assert answers(guessing, [repeated], max_tokens=40) == plain


@pytest.mark.parametrize("family", SHARING)
def test_layers_that_share_have_no_bytes(family: str) -> None:
    shared = geometry_of(tiny_config(family, **FAMILIES[family]))
    assert shared.shared == ((3, 1), (4, 1), (5, 2))
    assert [shared.index_of(place) for place in range(6)] == [0, 1, 2, 1, 1, 2]
    assert [shared.read_again(place) for place in range(6)] == [False, True, True, True, False, False]
    without = geometry_of(tiny_config(family, **{**FAMILIES[family], "num_kv_shared_layers": 0}))
    assert (shared.num_layers, without.num_layers, without.shared) == (3, 6, ())
    assert shared.layers == without.layers[:3]

    def page(geometry: ModelGeometry) -> int:
        return PoolLayout.of(geometry, parse_policy("int8", geometry.num_layers)).sealed.used_bytes

    assert 2 * page(shared) == page(without)


def test_a_layer_that_shares_and_attends_in_another_way_is_refused() -> None:
    options = {**SHARING["gemma3n_text"]}
    model = tiny_model("gemma3n_text", **options)
    with pytest.MonkeyPatch.context() as patch:
        attention = type(model.model.layers[0].self_attn)
        own = attention.__init__

        def changed(self: torch.nn.Module, config: object, layer_idx: int) -> None:
            own(self, config, layer_idx)
            self.scaling = 0.5 if layer_idx == 5 else 1.0

        patch.setattr(attention, "__init__", changed)
        with pytest.raises(UnsupportedError, match="layer 5 shares the keys and values of layer 2 and attends"):
            geometry_of(model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_of_a_padded_batch(family: str) -> None:
    """transformers' loop asks sharing layers for a prompt's last token only."""
    inputs = left_padded([110, 90, 5])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    model = hugging_face_model(family, **FAMILIES[family])
    right = [
        model.generate(
            inputs["input_ids"][row : row + 1, -n:], past_key_values=DynamicCache(config=model.config), **options
        )[0, n:]
        for row, n in enumerate((110, 90, 5))
    ]
    cache = QuantizedCache(model, "bf16", kv_cache_memory="16MiB")
    out = model.generate(**inputs, past_key_values=cache, **options)[:, 110:]
    if family == "llama4_text":  # its temperature counts padding, in transformers too
        assert torch.equal(out[0], right[0])
    else:
        assert torch.equal(out, torch.stack(right))


def test_errors_by_layer_are_of_layers_that_store() -> None:
    loaded = loaded_of("gemma4_text")
    found = measure_layers(loaded, [loaded.policy("int4")], [*PROMPT, *prompt(NEW, 3)])["int4"]
    sums = torch.tensor(found.as_json())
    assert sums.shape[1] == 3
    assert torch.isfinite(sums).all()
    energy = sums[1] / (sums[0] + 1e-30)
    assert (energy > 3).all(), "int4 is near 16 bit"


def test_what_cannot_do_shared_keys_says_so() -> None:
    geometry = loaded_of("gemma3n_text").geometry
    with pytest.raises(UnsupportedError, match="calibration cannot do layers that share keys and values; layer 3 of"):
        geometry.refuse_shared("calibration")
