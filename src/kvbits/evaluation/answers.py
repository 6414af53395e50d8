"""Questions answered greedily by one cache dtype, together and each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import kvbits
from kvbits.codecs import Policy
from kvbits.config import AUTO
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import REFERENCE, pool_bytes
from kvbits.evaluation.drive import drive
from kvbits.evaluation.resume import ResumeCache, key_of
from kvbits.models import LoadedModel

TOGETHER = 8
"""Questions that run at once."""


def answer(
    kind: str,
    loaded: LoadedModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    resume_cache: ResumeCache,
    compute_dtype: str,
    max_num_batched_tokens: int,
    progress: Callable[[int], None],
    state_dtype: str = AUTO,
) -> list[str]:
    """The text after every prompt (token ids); ``progress`` is told the prompt tokens done since its last call."""
    where = [kind, kvbits.__version__, loaded.fingerprint, policy.name, compute_dtype]
    assert params.max_tokens is not None
    left = sum(map(len, prompts))
    key = key_of(*where, params.max_tokens, [list(prompt) for prompt in prompts])
    if key not in resume_cache:
        longest = max(map(len, prompts)) + params.max_tokens
        # What the prompts begin with in common is stored once; each question holds its own end.
        memory = pool_bytes(loaded, policy, 2, longest, max_num_batched_tokens, state_dtype)
        memory += pool_bytes(loaded, loaded.policy(REFERENCE), TOGETHER, 4 * params.max_tokens)
        config = EngineConfig(
            policy,
            memory,
            max_num_seqs=TOGETHER,
            max_num_batched_tokens=max_num_batched_tokens,
            state_dtype=state_dtype,
        )
        texts = [""] * len(prompts)
        for step in drive(Engine(loaded, config), prompts, params):
            for delta in step.deltas:
                texts[int(delta.request_id)] += delta.text
            progress(step.prompt_tokens)
            left -= step.prompt_tokens
        resume_cache.put(key, texts)
    progress(left)  # what was in the prefix cache, or kept
    found: list[str] = resume_cache[key]
    return found
