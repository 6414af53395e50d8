"""Several engines or caches on one loaded model, each in a thread of its own: answers are those of each alone."""

from __future__ import annotations

import copy
import dataclasses
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.serving import engine_of, packed_byte_model
from helpers.tiny import tiny_model

from kvbits import LLM, SamplingParams
from kvbits.engine.grammar import GrammarCompiler
from kvbits.errors import RequestError, UnsupportedError
from kvbits.hf import QuantizedCache
from kvbits.kernels.cpu import CpuBackend
from kvbits.models import LoadedModel
from kvbits.models.packed import pack_linears

THREADS = 3
PARAMS = SamplingParams(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True, logprobs=2)


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads change places far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(3, 259), k=n) for n in (200, 70, 333)]


def side_by_side(work: Callable[[int], object]) -> list[object]:
    """``work(i)`` in a thread for each ``i``; they begin together."""
    gate = threading.Barrier(THREADS)

    def start(index: int) -> object:
        gate.wait(20)
        return work(index)

    with ThreadPoolExecutor(THREADS) as pool:
        return [f.result(120) for f in [pool.submit(start, i) for i in range(THREADS)]]


def assert_as_alone(work: Callable[[int], object], rounds: int = 3) -> None:
    alone = [work(i) for i in range(THREADS)]
    for _ in range(rounds):
        assert side_by_side(work) == alone


def answers(llm: LLM, seed: int, params: SamplingParams = PARAMS) -> list[object]:
    return [(r.error, r.outputs[0].token_ids, r.outputs[0].logprobs) for r in llm.generate(prompts(seed), params)]


def llm_of(loaded: LoadedModel, **options: object) -> LLM:
    options = {"kv_cache_dtype": "int8", "kv_cache_memory": "4MiB", "enable_prefix_caching": False, **options}
    return LLM(loaded, progress=False, **options)


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_engines_on_one_fused_model(weight_format: str) -> None:
    loaded = packed_byte_model(weight_format)
    llms = [llm_of(loaded) for _ in range(THREADS)]
    assert_as_alone(lambda i: answers(llms[i], i))


def test_one_llm_in_several_threads() -> None:
    llm = llm_of(packed_byte_model())
    assert_as_alone(lambda i: answers(llm, i))


def test_a_call_from_inside_a_call_is_refused() -> None:
    llm = llm_of(packed_byte_model())
    with pytest.raises(RequestError, match="on_token must not call the LLM"):
        llm.generate([[5, 6, 7]], PARAMS, on_token=lambda index, delta: llm.generate([[8]]) and None)
    assert answers(llm, 1) == answers(llm_of(llm.loaded), 1)


def test_engines_on_one_packed_model() -> None:
    loaded = packed_byte_model(fused=False)
    llms = [llm_of(loaded) for _ in range(THREADS)]
    assert_as_alone(lambda i: answers(llms[i], i))


@pytest.mark.parametrize("fused", [True, False])
def test_engines_that_share_their_kernels(fused: bool) -> None:
    """One backend's scratch memory and threads, two of them whatever torch has here."""
    loaded = packed_byte_model(fused=fused)
    kernels = CpuBackend(threads=2)
    llms = [llm_of(loaded, backend=kernels) for _ in range(THREADS)]
    assert_as_alone(lambda i: answers(llms[i], i))


def test_more_threads_than_cores_beside_another_process() -> None:
    """A thread whose core is taken comes late to a call or not at all: the others do its tasks, the bits stay."""
    loaded = packed_byte_model()
    expected = answers(llm_of(loaded, backend=CpuBackend(threads=1)), 1)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            for threads in (2, 9):
                assert answers(llm_of(loaded, backend=CpuBackend(threads=threads)), 1) == expected
        finally:
            other.kill()


def test_text_and_a_grammar_from_one_tokenizer() -> None:
    loaded = packed_byte_model()
    grammar = GrammarCompiler(loaded).json_schema({"type": "array", "items": {"type": "integer"}})
    params = dataclasses.replace(PARAMS, grammar=grammar)
    llms = [llm_of(loaded) for _ in range(THREADS)]

    def work(index: int) -> object:
        results = llms[index].generate([f"text {index} " * 9, "more"], params)
        return [(r.prompt_token_ids, r.outputs[0].text, r.error) for r in results]

    assert_as_alone(work)


@pytest.mark.parametrize(("family", "twins"), [("llama", False), ("llama", True), ("gemma3_text", True)])
def test_transformers_caches_on_one_model(family: str, twins: bool) -> None:
    """``twins``: caches that share their pages too."""
    model = tiny_model(family, max_position_embeddings=1024).bfloat16()
    pack_linears(model)
    caches = [QuantizedCache(model, "int8", kv_cache_memory="8MiB") for _ in range(THREADS)]
    first = torch.randint(3, 97, (2, 130), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for cache in caches:
            model(first, past_key_values=cache)

    def work(index: int) -> object:
        cache = copy.deepcopy(caches[0 if twins else index])
        prompt = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(index + 1))
        both = torch.cat([first, prompt], 1)
        return model.generate(both, past_key_values=cache, max_new_tokens=20, do_sample=False).tolist()

    assert_as_alone(work)


def test_an_engine_beside_a_transformers_cache() -> None:
    """One model's layers have one attention at a time: who comes second says so; a fused model serves both."""
    fused, packed = packed_byte_model(), packed_byte_model(fused=False)
    for loaded in (fused, packed):
        llm = llm_of(loaded)
        expected = answers(llm, 0)
        cache = QuantizedCache(loaded.model, "int8", kv_cache_memory="4MiB")
        tokens = torch.tensor(prompts(0)[:1])
        with torch.inference_mode():
            loaded.model(tokens, past_key_values=cache)
        if loaded is fused:
            assert answers(llm, 0) == expected
            continue
        for error, _, _ in answers(llm, 0):
            assert "attention was switched by kvbits.hf.QuantizedCache" in error
        loaded.model.set_attn_implementation("kvbits")
        assert answers(llm, 0) == expected
        with pytest.raises(UnsupportedError, match="cannot read a kvbits cache"), torch.inference_mode():
            loaded.model(tokens, past_key_values=cache)


def test_a_step_of_one_engine_waits_for_no_other() -> None:
    """A second engine works while the first one's thread stands still inside a step."""
    loaded = packed_byte_model()
    first, second = engine_of(loaded), llm_of(loaded)
    inside, go_on = threading.Event(), threading.Event()
    plain = first._runner.run

    def slow(batch: object) -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        return plain(batch)

    first._runner.run = slow
    first.add_request(prompts(1)[0], PARAMS)
    thread = threading.Thread(target=first.step)
    thread.start()
    assert inside.wait(20)
    assert all(error is None for error, _, _ in answers(second, 0))
    go_on.set()
    thread.join(20)
    assert not thread.is_alive()
