"""How an answer of the engine ends, and a request that cannot be served."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import dataclasses
import time

import pytest
from helpers.tiny import VOCAB
from helpers.tiny_engine import (  # noqa: F401
    GREEDY,
    PROMPTS,
    assert_idle,
    backend,
    loaded,
    make,
    one_thread,
    original,
    prompt_of,
    tokens,
)
from torch import Tensor

from kvbits import LLM
from kvbits.errors import RequestError
from kvbits.kernels import Backend
from kvbits.models import LoadedModel


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


def test_a_bad_prompt_is_an_error_for_itself_only(loaded: LoadedModel, backend: Backend) -> None:
    llm = make(loaded, backend, "int8", frames=10)
    bad = {
        1: (prompt_of(2000), "maximum context length is 511 tokens (the KV cache"),
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
