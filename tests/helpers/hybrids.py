"""Tiny models with recurrent layers: in an engine, and their answers by transformers alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from helpers.hugging_face import hugging_face_model
from helpers.serving import engine_of, packed_byte_model
from helpers.tiny import VOCAB, tiny_model
from kvbits import SamplingParams
from kvbits.engine.engine import Engine
from kvbits.engine.model_runner import ModelRunner
from kvbits.models import LoadedModel
from kvbits.models.load import wrap


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(n, n) for n in (70, 5, 131)]
"""One of more than a page, a short one, and one of more than two pages."""

TOKENS = 65
"""Of an answer: it crosses the end of a page."""


@cache
def loaded_of(family: str) -> LoadedModel:
    return wrap(tiny_model(family), None, family)


@cache
def expected(family: str) -> list[list[int]]:
    """The greedy answers of transformers' own ``generate`` with its own cache, keys and values in bfloat16."""
    model, answers = hugging_face_model(family), []
    for tokens in PROMPTS:
        found = model.generate(torch.tensor([tokens]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        answers.append(found[0, len(tokens) :].tolist())
    assert all(len(set(answer)) > 10 for answer in answers), "the answers repeat themselves"
    return answers


def own_logits(family: str, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return hugging_face_model(family)(torch.tensor([tokens])).logits[0].float()


class Spoiled(ModelRunner):
    """Before every step, the slots that no sequence and no snapshot owns hold numbers that are none."""

    def run(self, batch: object) -> Tensor:
        slots = self._pages.states
        named = {*slots._own.values(), *slots._kept.values()}
        self._pool.states._buffer[[slot for slot in range(slots.num_slots) if slot not in named]] = 0xFF
        return super().run(batch)


def hybrid_engine(family: str, **changes: object) -> Engine:
    loaded = loaded_of(family)
    config = engine_of(
        loaded, **{"kv_cache_dtype": "bf16", "max_num_batched_tokens": 100, "max_num_seqs": 8, **changes}
    )
    return Engine(loaded, config.config, runner=Spoiled)


def answers(engine: Engine, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """Greedy answers to all at once, sequence after sequence, pages and slots checked at every step."""
    params = SamplingParams(**{"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **options})
    for number, tokens in enumerate(prompts):
        engine.add_request(tokens, params, request_id=f"{number}")
    found: dict[tuple[int, int], list[int]] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None, delta
            found.setdefault((int(delta.request_id), delta.index), []).extend(delta.token_ids)
        engine.pages.check()
    return [found[key] for key in sorted(found)]


def check_bits(family: str, **options: object) -> None:
    """Answers and log-probabilities, to the last bit, whoever else runs, wherever prompts are cut and found again."""
    loaded = packed_byte_model(family=family, fused=False)
    texts = [[token + 3 for token in text] for text in PROMPTS]

    def run(chunk: int, caching: bool, asked: list[list[int]]) -> list[object]:
        engine = engine_of(
            loaded, max_num_batched_tokens=chunk, enable_prefix_caching=caching, batch_invariant=True, **options
        )
        found: dict[str, list] = {}
        for number, text in enumerate(asked):
            params = SamplingParams(max_tokens=10, temperature=0, logprobs=2, ignore_eos=True)
            engine.add_request(text, params, request_id=f"{number}")
        while engine.has_unfinished():
            for delta in engine.step():
                found.setdefault(delta.request_id, []).extend(delta.logprobs)
        return [found[key] for key in sorted(found)]

    together = run(50, True, [*texts, texts[2]])
    assert together == [*(run(1000, False, [text])[0] for text in texts), together[2]]
