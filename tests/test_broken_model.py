"""NaN and infinities: no kernel drops them, and only the request that meets them ends, with an error that says so."""

from __future__ import annotations

import math
from dataclasses import replace

import httpx
import pytest
import torch
from helpers.attention import PLAIN, make_inputs, run
from helpers.serving import MODEL, byte_model, engine_of, running
from helpers.tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from kvbits import SamplingParams
from kvbits.codecs import SCHEMES
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.outputs import Delta
from kvbits.errors import RequestError
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.models import LoadedModel
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.load import wrap
from kvbits.models.packed import PackedEmbedding, pack_linears

BROKEN = 50
"""The token whose embedding is no number."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias={BROKEN: -100.0})
WHOLE = [5, 6, 7, *range(8, 40), *range(60, 96)] * 2
GUILTY = [*WHOLE[:30], BROKEN, *WHOLE[30:100]]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", SCHEMES)
def test_kernels_carry_them_to_the_result(dtype: str, isa: str) -> None:
    """In a query, a key or a value: while its page is open, and sealed, one token a step and many."""
    for number in (math.nan, math.inf, -math.inf):
        for what, chunk in (("query", 1000), ("key", 1), ("key", 1000), ("value", 1), ("value", 1000)):
            inputs = make_inputs(replace(PLAIN, num_heads=2), [130])
            getattr(inputs, what)[0][70 if what == "query" else 9, 1, 3] = number
            (out,), _ = run(CpuBackend(isa), replace(PLAIN, num_heads=2), dtype, inputs, chunk)
            suspects = out[70:71, 1] if what == "query" else out[9:, 1]
            if what == "key" and math.isinf(number):  # a score of -inf is a weight of 0, in the open page
                suspects = suspects[55:] if dtype != "bf16" else suspects[:0]
            assert not suspects.isfinite().all(-1).any(), (number, what, chunk)
            assert out[:, 0].isfinite().all(), (number, what, chunk)


def transformers_model() -> LoadedModel:
    return wrap(tiny_model("llama"), None, "tiny")


def fused_model(weights: str) -> LoadedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    found = wrap(model.to(torch.bfloat16), None, "tiny")
    pack_linears(found.model, weights)
    embedding = found.model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):  # one that can be broken
        rows = embedding(torch.arange(config.vocab_size))
        found.model.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows))
    fused = fuse(found.model, found.geometry)
    assert isinstance(fused, FusedModel), fused
    return replace(found, fused=fused)


MODELS = {
    "transformers": transformers_model,
    "fused": lambda: fused_model("bf16"),
    "fused, int8 weights": lambda: fused_model("int8"),
    "fused, int4 weights": lambda: fused_model("int4"),
}


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[Delta]]:
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    found: dict[str, list[Delta]] = {request: [] for request in ids}
    while engine.has_unfinished():
        for delta in engine.step():
            found[delta.request_id].append(delta)
    return list(found.values())


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", MODELS)
def test_only_the_request_that_meets_them_ends(kind: str, isa: str) -> None:
    loaded = MODELS[kind]()
    embedding = loaded.model.get_input_embeddings()
    expected = answers(engine(loaded, isa), [WHOLE, WHOLE[3:90]], GREEDY)
    for number in (math.nan, math.inf):
        with torch.no_grad():
            embedding.weight[BROKEN] = number
        for budget in (512, 20):  # in a step with the others, and in pieces of which most have no logits
            got = answers(engine(loaded, isa, budget), [WHOLE, GUILTY, WHOLE[3:90]], GREEDY)
            assert [tokens(got[0]), tokens(got[2])] == [tokens(x) for x in expected]
            assert "logits that are not finite" in (got[1][-1].error or ""), (number, budget)
            assert tokens(got[1]) == []


def engine(loaded: LoadedModel, isa: str, budget: int = 512, dtype: str = "int8") -> Engine:
    config = EngineConfig(dtype, 1 << 22, max_num_batched_tokens=budget)
    return Engine(loaded, config, CpuBackend(isa, threads=1))


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "q_proj", "down_proj", "lm_head", "norm"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "nf4"])
def test_a_broken_weight_anywhere(part: str, dtype: str) -> None:
    loaded = transformers_model()
    weights = [p for name, p in loaded.model.named_parameters() if f"{part}." in name]
    with torch.no_grad():
        weights[len(weights) // 2].flatten()[3] = math.nan
    for isa in available_isas():
        got = answers(engine(loaded, isa, dtype=dtype), [WHOLE], GREEDY)
        assert "not finite" in (got[0][-1].error or ""), (part, isa)


def test_prompt_logprobs_and_evaluations_say_so_too() -> None:
    loaded = transformers_model()
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[BROKEN] = math.nan
    params = replace(GREEDY, prompt_logprobs=1)
    for budget in (512, 20):
        served = engine(loaded, "auto", budget)
        good, bad = answers(served, [WHOLE, GUILTY], params)
        assert good[-1].error is None
        assert "not finite" in (bad[-1].error or "")
        assert tokens(bad) == []
        with pytest.raises(RequestError, match="not finite"):
            list(served.teacher_forced(GUILTY, 1))
        assert served.load().running == 0
        assert len(list(served.teacher_forced(WHOLE, 1))) > 0


def test_the_server_names_it_and_goes_on() -> None:
    loaded = byte_model()
    broken = loaded.tokenizer.encode("~")[-1]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[broken] = math.nan
    ask = {"model": MODEL, "max_tokens": 4, "temperature": 0, "logit_bias": {str(broken): -100}}
    with running(engine_of(loaded)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        before = client.post("/v1/completions", json=ask | {"prompt": "all is well"})
        for prompt in ("what ~ is this", ["all is well", "~"]):
            answer = client.post("/v1/completions", json=ask | {"prompt": prompt})
            assert answer.status_code == 500, answer.text
            assert "logits that are not finite" in answer.json()["error"]["message"]
        after = client.post("/v1/completions", json=ask | {"prompt": "all is well"})
        assert before.status_code == after.status_code == 200
        assert before.json()["choices"] == after.json()["choices"]
        assert client.get("/health").status_code == 200
