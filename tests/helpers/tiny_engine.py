"""Engines on a tiny Llama: its fixtures, and what is asked of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from helpers.tiny import VOCAB, tiny_model, tiny_tokenizer
from kvbits import LLM, SamplingParams
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
