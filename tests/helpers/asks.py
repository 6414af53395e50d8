"""The engines, requests and isolated answers of :mod:`helpers.stress`."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from functools import cache

from helpers.mischief import BadGrammar
from helpers.serving import engine_of, packed_byte_model
from helpers.tiny import HYBRIDS, LATENTS
from kvbits.codecs.states import StateLayout
from kvbits.engine.engine import Engine
from kvbits.engine.grammar import Grammar, GrammarCompiler
from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.engine.speculation import SpeculativeConfig, Speculator
from kvbits.engine.speculation.methods import draft_model
from kvbits.kernels.cpu import CpuBackend
from kvbits.models import LoadedModel


class Keeping(CpuBackend):
    """Kernels that are told to keep every page."""

    layer_groups = False


METHODS = ("none", "ngram", "draft_model", "self")


FAMILIES = {"llama": 1, "qwen3-window": 3, "lfm2": 1, "qwen3_next-dense": 1, "minicpm3": 1}
"""Shapes of models: one with plain attention, one with windows whose layers are cut into groups of frames so many times
as many, two with recurrent layers, one with cached latents."""

UNFUSED = (*HYBRIDS, *LATENTS)


@cache
def model(family: str = "llama", seed: int = 0) -> LoadedModel:
    return packed_byte_model(family=family, seed=seed, fused=family not in UNFUSED)


def kinds() -> list[tuple[str, str]]:
    """Methods of speculation and the families that they work for."""
    return [(m, family) for family in FAMILIES for m in METHODS if m != "self" or family not in UNFUSED]


@cache
def grammars() -> list[Grammar]:
    compiler = GrammarCompiler(model())
    numbers = {"type": "array", "items": {"type": "integer"}, "maxItems": 4}
    schema = {"type": "object", "properties": {"a": numbers}, "required": ["a"]}
    return [compiler.json_object(), compiler.json_schema(schema), compiler.lark('start: /[a-f]{3,20}/ " " /x+/')]


@dataclass(frozen=True)
class Setup:
    """The engine of one run."""

    method: str
    family: str
    dtype: str
    frames: int
    budget: int
    seats: int
    offload: int
    caching: bool
    faults: bool
    adaptive: bool
    guesses: int
    draft_seed: int
    draft_frames: int
    arrivals: float

    @classmethod
    def draw(cls, rng: random.Random, method: str, family: str) -> Setup:
        return cls(
            method=method,
            family=family,
            dtype="int8h" if method == "self" else rng.choice(("int8", "int4", "int4+sink:int8", "nf4", "int8h")),
            frames=rng.choice((12, 14, 16, 20, 40)) * FAMILIES[family],
            budget=rng.choice((5, 48, 64, 100, 256)),
            seats=rng.choice((3, 6, 12)),
            offload=rng.choice((0, 0, 12, 60)),
            caching=rng.random() < 0.85,
            faults=rng.random() < 0.75,
            adaptive=rng.random() < 0.4,
            guesses=rng.choice((1, 3, 6, 20)),
            draft_seed=rng.choice((0, 0, 7)),
            draft_frames=rng.choice((8, 20, 100)) * FAMILIES[family],
            arrivals=rng.choice((0.05, 0.2, 0.8)),
        )

    def engine(self) -> Engine:
        served = model(self.family)
        size = engine_of(served, kv_cache_dtype=self.dtype).pool.layout.frame_bytes
        engine = engine_of(
            served,
            kv_cache_dtype=self.dtype,
            kv_cache_memory=self.frames * size + state_bytes(served, self.seats),
            max_num_batched_tokens=self.budget,
            max_num_seqs=self.seats,
            enable_prefix_caching=self.caching,
            kv_offload_size=self.offload * size + tier_bytes(served) if self.offload and self.caching else None,
            batch_invariant=True,
        )
        if self.method == "none":
            return engine
        options = {"num_speculative_tokens": self.guesses, "adaptive": self.adaptive, "prompt_lookup_min": 1}
        if self.method != "draft_model":
            return Engine(served, engine.config, speculative=SpeculativeConfig(method=self.method, **options))
        own = "llama" if self.family in HYBRIDS else self.family
        draft = engine_of(model(own, self.draft_seed), kv_cache_dtype="int8").pool.layout.frame_bytes
        config = SpeculativeConfig(
            method="draft_model", model="x", kv_cache_memory=self.draft_frames * draft, **options
        )
        proposer = draft_model(model(own, self.draft_seed), config, served, engine.config)
        engine.speculator = Speculator(proposer, config, engine.stats.speculation)
        return engine


def state_bytes(served: LoadedModel, sequences: int) -> int:
    """What an engine for so many sequences takes for the states of recurrent layers."""
    layout = StateLayout.of(served.geometry)
    return 0 if layout is None else layout.slot_bytes * (2 * sequences + 1)


def tier_bytes(served: LoadedModel) -> int:
    """Room for the states of two sequences in the second tier."""
    layout = StateLayout.of(served.geometry)
    return 0 if layout is None else 2 * layout.slot_bytes


@dataclass
class Ask:
    """A request, what happened to it on purpose, and what it has got so far."""

    id: str
    prompt: list[int]
    params: SamplingParams
    salt: str
    bad: BadGrammar | None = None
    fate: str | None = None
    seq_ids: list[int] = field(default_factory=list)
    deltas: dict[int, list[Delta]] = field(default_factory=dict)

    @property
    def sent(self) -> SamplingParams:
        """``bad``: a grammar that allows everything, and fails."""
        return self.params if self.bad is None else dataclasses.replace(self.params, grammar=self.bad)

    @property
    def done(self) -> bool:
        return sum(d[-1].finish_reason is not None for d in self.deltas.values()) == self.params.n


def whole(deltas: list[Delta]) -> dict[str, object]:
    last = deltas[-1]
    return {
        "tokens": [t for d in deltas for t in d.token_ids],
        "text": "".join(d.text for d in deltas),
        "logprobs": [entry for d in deltas for entry in d.logprobs or ()],
        "prompt_logprobs": [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None],
        "ended": (last.finish_reason, last.stop_reason, last.note),
    }


def alone(ask: Ask, dtype: str, family: str) -> dict[int, dict[str, object]]:
    """The answers to ``ask`` without anything beside it, from a cache that keeps every page."""
    engine = engine_of(
        model(family), Keeping(), kv_cache_dtype=dtype, kv_cache_memory=8 << 20, enable_prefix_caching=False,
        batch_invariant=family in HYBRIDS,
    )  # fmt: skip
    engine.add_request(ask.prompt, ask.params, request_id=ask.id)
    deltas: dict[int, list[Delta]] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None, delta
            deltas.setdefault(delta.index, []).append(delta)
    return {index: whole(found) for index, found in deltas.items()}
