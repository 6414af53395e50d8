"""A model whose rows do not depend on each other, requests of every kind, and a proposer that knows the answers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cache

import pytest

from helpers.serving import MODEL, byte_tokenizer
from helpers.tiny import tiny_model
from kvbits.engine.engine import Engine
from kvbits.engine.grammar import GrammarCompiler
from kvbits.engine.params import SamplingParams
from kvbits.engine.request import Request
from kvbits.engine.speculation import Candidate, Proposer, SpeculativeConfig, Speculator
from kvbits.models import LoadedModel
from kvbits.models.load import wrap
from kvbits.models.packed import pack_linears

EAGER = SpeculativeConfig(adaptive=False, num_speculative_tokens=6)
GREEDY = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)


@cache
def model() -> LoadedModel:
    """In bfloat16 with packed layers: a row's bits do not depend on the rows beside it, so all must be equal."""
    loaded = wrap(tiny_model("llama", vocab_size=259, max_position_embeddings=1024).bfloat16(), byte_tokenizer(), MODEL)
    pack_linears(loaded.model)
    if reason := loaded.depends_on_rows():
        pytest.skip(reason)
    return loaded


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=length)


PROMPTS = [prompt_of(n, n) for n in (5, 40, 62, 63, 64, 190)]


class Oracle(Proposer):
    """Knows the answers, and guesses a random number of their tokens rightly before it goes wrong."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], seed: int = 0) -> None:
        self._answers = answers
        self._random = random.Random(seed)

    def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        guesses = []
        for c in candidates:
            rest = self._answers[tuple(c.request.prompt)][c.request.num_output :][: c.count]
            good = self._random.randint(0, c.count)
            guesses.append([t if i < good else (t + 1) % 259 for i, t in enumerate(rest)])
        return guesses

    def forget(self, request: Request) -> None:
        pass


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple[object, ...]]:
    """Tokens, text, reasons and log-probabilities of each prompt's sequences."""
    found: dict[tuple[str, int], list] = {}
    for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(prompt, param, request_id=str(i))
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None
            found.setdefault((delta.request_id, delta.index), []).append(delta)
        engine.pages.check()
    answers = []
    for key, deltas in sorted(found.items()):
        assert all(d.finish_reason is None for d in deltas[:-1])
        last = deltas[-1]
        logprobs = [entry for d in deltas for entry in d.logprobs or ()]
        tokens = [t for d in deltas for t in d.token_ids]
        answers.append((key, tokens, "".join(d.text for d in deltas), last.finish_reason, last.stop_reason, logprobs))
    return answers


def oracle(engine: Engine, prompts: list[list[int]], answers: list[tuple], seed: int = 0) -> Engine:
    by_prompt = {tuple(p): a[1] for p, a in zip(prompts, answers, strict=True)}
    engine.speculator = Speculator(Oracle(by_prompt, seed), EAGER, engine.stats.speculation)
    return engine


def json_params() -> SamplingParams:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
    return dataclasses.replace(GREEDY, max_tokens=80, grammar=GrammarCompiler(model()).json_schema(schema))


LETTERS = tuple(range(68, 78))
"""Tokens of ten letters, of which words are made that must not come."""

KINDS = {
    "ends held back": dataclasses.replace(GREEDY, ignore_eos=False, stop_token_ids=tuple(range(40, 48)), min_tokens=90),
    "stop strings held back": dataclasses.replace(
        GREEDY, stop=list("abcdefgh"), min_tokens=20, include_stop_str_in_output=True
    ),
    "few tokens": dataclasses.replace(GREEDY, allowed_token_ids=(0, *LETTERS), skip_special_tokens=False),
    "bad words": SamplingParams(
        max_tokens=150, seed=7, allowed_token_ids=LETTERS, bad_words=("bc", "c", "def"), ignore_eos=True
    ),
    "greedy": GREEDY,
    "short": dataclasses.replace(GREEDY, max_tokens=7),
    "end tokens": dataclasses.replace(GREEDY, ignore_eos=False, stop_token_ids=tuple(range(40, 48))),
    "stop strings": dataclasses.replace(GREEDY, stop=[chr(97 + i) + "" for i in range(8)]),
    "logprobs": dataclasses.replace(GREEDY, logprobs=3),
    "penalties": dataclasses.replace(GREEDY, frequency_penalty=0.5, repetition_penalty=1.3, logit_bias={50: 2.0}),
    "sampled": SamplingParams(max_tokens=150, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True),
    "sampled with penalties": SamplingParams(max_tokens=150, presence_penalty=0.7, seed=6, logprobs=1, ignore_eos=True),
}
