"""Every model family with a kvbits cache in ``generate``, against transformers' own caches and attention."""

from __future__ import annotations

import pytest
import torch
from helpers.hugging_face import coded_page_logits, hugging_face_model, left_padded
from helpers.tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import DynamicCache

from kvbits.hf import QuantizedCache
from kvbits.kernels import Backend
from kvbits.kernels.reference import ReferenceBackend

NEW = 70
OPTIONS = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
TOKENS = left_padded([150])["input_ids"][0].tolist()
"""Two full pages and an open one; longer than every window of the tiny models."""


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bit_generation_is_that_of_the_librarys_own_cache(family: str) -> None:
    # a padded batch; prompts longer than every window, and generation over two page boundaries
    inputs = left_padded([110, 90, 5])
    model = hugging_face_model(family)
    library = DynamicCache(config=model.config)
    expected = model.generate(**inputs, past_key_values=library, max_new_tokens=NEW, **OPTIONS)
    cache = QuantizedCache(model, "bf16", kv_cache_memory="8MiB")
    got = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, **OPTIONS)
    assert got.past_key_values is cache
    assert torch.equal(got.sequences, expected.sequences)
    assert difference(torch.stack(got.logits), torch.stack(expected.logits)) < 5e-3
    assert cache.get_seq_length() == 110 + NEW - 1


ALL_EXPERTS: dict[str, dict[str, int]] = {
    "gpt_oss": {"num_experts_per_tok": 4},
    "mixtral": {"num_experts_per_tok": 5},
    "qwen3_moe": {"num_experts_per_tok": 6},
    "deepseek_v3": {"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1},
}
"""Every token goes to all experts: else the last bit of a sum decides which ones, and the logits jump."""


def forced(model: torch.nn.Module, dtype: str, chunks: list[int], backend: Backend | None = None) -> Tensor:
    """Logits ``float32 [tokens, vocab]`` of :data:`TOKENS` through a fresh cache."""
    cache = QuantizedCache(model, dtype, kv_cache_memory="8MiB", backend=backend)
    with torch.inference_mode():
        parts = [model(ids, past_key_values=cache).logits[0] for ids in torch.tensor([TOKENS]).split(chunks, dim=1)]
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("family", "dtype"), [*((f, "int4") for f in FAMILIES if f != "deepseek_v3"), ("llama", "int8")]
)
def test_logits_are_those_of_pages_replaced_by_their_codes(family: str, dtype: str) -> None:
    # the latents of deepseek's DynamicCache are not what its attention sees, so its pages cannot be replaced
    model = hugging_face_model(family)
    expected = coded_page_logits(model, dtype, TOKENS)
    assert difference(forced(model, dtype, [1] * len(TOKENS), ReferenceBackend()), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_kernels_add_little_to_what_the_codes_cost(family: str) -> None:
    model = tiny_model(family, **ALL_EXPERTS.get(family, {}))
    chunks = [100, 30, *[1] * 20]
    exact = forced(model, "bf16", chunks, ReferenceBackend())
    for dtype, share in (("int8", 0.1), ("int4", 0.2)):
        reference = forced(model, dtype, chunks, ReferenceBackend())
        fused = forced(model, dtype, chunks)
        assert rms(fused - reference) < share * rms(reference - exact)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_batch_gives_what_each_prompt_gives_alone(family: str) -> None:
    model = tiny_model(family)
    inputs = left_padded([100, 64, 7])
    batch = model.generate(
        **inputs, past_key_values=QuantizedCache(model, "int4", kv_cache_memory="8MiB"), max_new_tokens=80, **OPTIONS
    )
    for row, length in enumerate([100, 64, 7]):
        alone = model.generate(
            inputs["input_ids"][row : row + 1, -length:],
            past_key_values=QuantizedCache(model, "int4", kv_cache_memory="8MiB"),
            max_new_tokens=80,
            **OPTIONS,
        )
        assert torch.equal(alone.sequences[0, length:], batch.sequences[row, 100:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    cache = QuantizedCache(model, "int8", kv_cache_memory="8MiB")
    out = model.generate(**left_padded([70]), past_key_values=cache, max_new_tokens=5, **OPTIONS)
    exact = tiny_model("llama")
    expected = exact(out.sequences[:, :-1]).logits[0, -5:]
    assert out.logits[0].dtype == torch.float32
    assert difference(torch.cat(out.logits), expected) < 0.1
