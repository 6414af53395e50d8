"""Free text from one cache dtype: greedy, to see where it leaves the 16-bit cache's, and drawn, to see how it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import kvbits
from kvbits.codecs import Policy
from kvbits.config import AUTO
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import REFERENCE, engine_for, pool_bytes
from kvbits.evaluation.drive import drive
from kvbits.evaluation.repetition import distinct, divergence, loop_length, repeated
from kvbits.evaluation.resume import ResumeCache, key_of
from kvbits.models import LoadedModel

Mode = Literal["greedy", "drawn"]
TEMPERATURE = 0.8
_MODES: tuple[Mode, ...] = ("greedy", "drawn")


@dataclass(frozen=True)
class Written:
    """One generated text. ``nll`` is its mean negative log-likelihood in nats a token, as the 16-bit cache sees it."""

    prompt: int
    mode: Mode
    tokens: tuple[int, ...]
    nll: float

    def facts(self, reference: Written) -> dict[str, Any]:
        """Figures of this text, ``reference`` being the 16-bit cache's from the same prompt and seed."""
        return {
            "repeated_4grams": repeated(self.tokens, 4),
            "distinct_1": distinct(self.tokens, 1),
            "distinct_2": distinct(self.tokens, 2),
            "loop": loop_length(self.tokens),
            "same_tokens": divergence(self.tokens, reference.tokens),
            "nll": self.nll,
        }


def write(
    loaded: LoadedModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    resume_cache: ResumeCache,
    compute_dtype: str = "float32",
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    state_dtype: str = AUTO,
) -> list[Written]:
    """Continue every prompt by ``new_tokens`` tokens, greedily and drawn (temperature 0.8, a seed for each prompt).

    All run in one batch; the seeds do not depend on the dtype. ``progress`` is told the tokens done since its last
    call. Raises ``RequestError`` when prompt and text do not fit the model.
    """
    where = [kvbits.__version__, loaded.fingerprint, policy.name, compute_dtype]
    content = [list(map(list, prompts)), new_tokens, TEMPERATURE]
    key = key_of("generation", *where, content)
    if key not in resume_cache:
        made = _continue(loaded, policy, prompts, new_tokens, max_num_batched_tokens, progress, state_dtype)
        resume_cache.put(key, made)
    else:
        progress(2 * sum(len(prompt) + new_tokens for prompt in prompts))
    texts: dict[str, list[int]] = resume_cache[key]
    scorer: Engine | None = None
    found = []
    for index, prompt in enumerate(prompts):
        for mode in _MODES:
            tokens = texts[f"{mode}-{index}"]
            whole = [*prompt, *tokens]
            own = key_of("score", kvbits.__version__, loaded.fingerprint, compute_dtype, len(prompt), whole)
            if own not in resume_cache:
                scorer = scorer or engine_for(
                    loaded, loaded.policy(REFERENCE), 1, len(prompt) + new_tokens, max_num_batched_tokens
                )
                resume_cache.put(own, _nll(scorer, whole, len(prompt)))
            progress(len(whole))
            found.append(Written(index, mode, tuple(tokens), resume_cache[own]))
    return found


def _continue(
    loaded: LoadedModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    max_num_batched_tokens: int,
    progress: Callable[[int], None],
    state_dtype: str,
) -> dict[str, list[int]]:
    count = len(_MODES) * len(prompts)
    longest = max(map(len, prompts)) + new_tokens
    config = EngineConfig(
        policy,
        pool_bytes(loaded, policy, count, longest, max_num_batched_tokens, state_dtype),
        max_num_seqs=count,
        max_num_batched_tokens=max_num_batched_tokens,
        state_dtype=state_dtype,
    )
    engine = Engine(loaded, config)
    texts: dict[str, list[int]] = {}
    for mode in _MODES:
        for index, prompt in enumerate(prompts):
            temperature = 0.0 if mode == "greedy" else TEMPERATURE
            params = SamplingParams(max_tokens=new_tokens, temperature=temperature, seed=index, ignore_eos=True)
            engine.add_request(prompt, params, request_id=f"{mode}-{index}")
            texts[f"{mode}-{index}"] = []
    for step in drive(engine, (), SamplingParams()):
        for delta in step.deltas:
            texts[delta.request_id].extend(delta.token_ids)
        progress(step.prompt_tokens + step.decoded)
    return texts


def _nll(engine: Engine, tokens: Sequence[int], prompt: int) -> float:
    """Mean negative log-likelihood of the tokens after the first ``prompt``."""
    total = 0.0
    for start, logits in engine.teacher_forced(tokens, prompt - 1):
        rows = min(len(logits), len(tokens) - 1 - start)
        targets = torch.tensor(tokens[start + 1 : start + 1 + rows])
        if rows:
            total += torch.nn.functional.cross_entropy(logits[:rows].double(), targets, reduction="sum").item()
    return total / (len(tokens) - prompt)
