"""Prefill and decode speed of one cache dtype, through the real engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvbits.codecs import Policy
from kvbits.config import AUTO, MIN_PREFILL
from kvbits.engine.params import SamplingParams
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.errors import ConfigError
from kvbits.evaluation.compare import engine_for
from kvbits.evaluation.drive import drive
from kvbits.evaluation.memory import peak_rss_bytes, reset_peak_rss
from kvbits.models import LoadedModel

WARM_UP = 2
"""Decode steps before the timed ones."""


@dataclass(frozen=True)
class Speed:
    """``prefill_tokens_per_s`` counts prompt tokens only; ``decode_step_ms`` is the median step of all sequences.

    ``kv_bytes_per_token`` is of sealed pages, ``kv_bytes_per_session`` what a sequence of ``context`` tokens holds, its
    open page and padding included and pages behind a window not, ``pool_bytes`` the whole reservation,
    ``peak_rss_bytes`` the process's greatest resident size during the run. With ``speculation`` a step brings more than
    one token to a sequence; ``decode_tokens_per_s`` counts them all.
    """

    dtype: str
    context: int
    batch: int
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_ms: float
    kv_bytes_per_token: float
    kv_bytes_per_session: int
    pool_bytes: int
    peak_rss_bytes: int
    speculation: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The result under the names of the command line's JSON."""
        return asdict(self)


def longest_sequence(
    loaded: LoadedModel, context: int, batch: int, new_tokens: int, max_num_batched_tokens: int
) -> int:
    """Tokens that the longest sequence of :func:`measure_speed` reaches.

    While the last prompts are computed the first sequences decode, one token a step. Raises ``ConfigError`` when the
    model's context is too short for it.
    """
    along = -(-batch * context // max(max_num_batched_tokens - batch, MIN_PREFILL)) + 1
    longest = context + along + WARM_UP + new_tokens
    if longest > loaded.geometry.max_position:
        raise ConfigError(
            f"a context of {context} and {new_tokens} new tokens (and {along + WARM_UP} on the way) exceed the "
            f"{loaded.geometry.max_position} tokens of {loaded.name}"
        )
    return longest


def measure_speed(
    loaded: LoadedModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    speculative: SpeculativeConfig | None = None,
    state_dtype: str = AUTO,
) -> Speed:
    """Prefill ``prompts`` (token ids, all of one length), then time ``new_tokens`` decode steps of all of them.

    Sequences whose prompt is stored decode along while the others' prompts are computed, as in service: they keep a few
    rows of each step, and start the timed steps with a few tokens more than the prompt. The pool is made to
    measure, without prefix caching. ``progress`` is told the tokens computed since its last call. Raises
    ``ConfigError`` when prompt and new tokens exceed the model's context. With ``speculative`` sequences grow faster,
    and the timed steps end early where the first of them reaches the end of the context.
    """
    context, batch = len(prompts[0]), len(prompts)
    longest = longest_sequence(loaded, context, batch, new_tokens, max_num_batched_tokens)
    if speculative is not None:
        growth = (longest - context) * (1 + speculative.num_speculative_tokens)
        longest = min(context + growth, loaded.geometry.max_position)
    reset_peak_rss()
    engine = engine_for(
        loaded, policy, batch, longest, max_num_batched_tokens, speculative=speculative, state_dtype=state_dtype
    )
    begun = prefilled = 0
    prefill_seconds = 0.0
    decode: list[float] = []
    tokens: list[int] = []
    params = SamplingParams(max_tokens=longest - context, temperature=0.0, ignore_eos=True)
    for step in drive(engine, prompts, params):
        if begun < batch:
            begun += step.begun
            prefilled += step.prompt_tokens
            prefill_seconds += step.seconds
            progress(step.prompt_tokens)
            continue
        if speculative is not None and any(d.finish_reason for d in step.deltas):
            break
        assert step.decoded == batch, (step.decoded, batch)
        decode.append(step.seconds)
        tokens.append(sum(len(d.token_ids) for d in step.deltas))
        progress(batch)
        if len(decode) == WARM_UP + new_tokens:
            break
    if len(decode) <= WARM_UP:
        raise ConfigError(f"a context of {context} leaves too few steps to time; choose a smaller one")
    timed = decode[WARM_UP:]
    median = statistics.median(timed)
    return Speed(
        dtype=policy.label,
        context=context,
        batch=batch,
        new_tokens=new_tokens,
        prefill_tokens_per_s=prefilled / prefill_seconds,
        decode_tokens_per_s=batch / median if speculative is None else sum(tokens[WARM_UP:]) / sum(timed),
        decode_step_ms=1000 * median,
        kv_bytes_per_token=engine.pool.bytes_per_token(),
        kv_bytes_per_session=engine.pool.session_bytes(context),
        pool_bytes=engine.config.kv_cache_memory,
        peak_rss_bytes=peak_rss_bytes(),
        speculation=None if speculative is None else engine.stats.speculation.as_json(),
    )


def distinct_prompts(tokens: Sequence[int], context: int, batch: int) -> list[list[int]]:
    """``batch`` prompts of ``context`` tokens, no two alike: windows of the text, spread evenly over it.

    They overlap where the text is short. Raises ``ConfigError`` when it has not even ``context + batch`` tokens.
    """
    room = len(tokens) - context
    if room < batch:
        raise ConfigError(
            f"the text has {len(tokens)} tokens; {batch} prompts of {context} tokens need at least {context + batch}"
        )
    starts = [index * room // max(1, batch - 1) for index in range(batch)]
    return [list(tokens[start : start + context]) for start in starts]
