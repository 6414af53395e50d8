"""The demo's measurement: the same long conversations from caches of different dtypes and the same size in bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvbits.codecs import Policy
from kvbits.engine import text
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.documents import Document, messages
from kvbits.evaluation.drive import drive
from kvbits.evaluation.fidelity import FidelitySummary
from kvbits.models import LoadedModel
from kvbits.planning.core import plan

CAPACITY_TOKENS = 4096
CAPACITY_BYTES = 1 << 30


@dataclass(frozen=True)
class Showing:
    """What one dtype did.

    ``sessions_admitted`` is the greatest number of conversations that got a token in one and the same step, so each
    held its whole document in the cache; ``sessions_capacity`` the number of 4,096-token sessions that 1 GiB holds by
    the pool's accounting, open pages included.
    """

    dtype: str
    sessions_admitted: int
    sessions_capacity: int
    kv_bytes_per_token: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    kl_mean: float
    top1_agreement: float
    answers_found: int
    answers_total: int
    preemptions: int
    seconds: float
    answers: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The result under the names of the command line's JSON."""
        return asdict(self)


def show(
    loaded: LoadedModel,
    policy: Policy,
    memory: int,
    documents: Sequence[Document],
    fidelity: FidelitySummary,
    new_tokens: int,
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Showing:
    """Ask every document's question at once, greedily, of an engine with ``memory`` bytes of cache.

    Each conversation goes on for ``new_tokens`` tokens, so that all that fit run together; the answer is what comes
    before the model's end token. Prefill speed is prompt tokens over the time of steps with prompt rows, decode speed
    tokens over the time of steps without any. ``progress`` is told the tokens computed since its last call. Raises
    ``RequestError`` when a document does not fit.
    """
    prompts = [text.encode_chat(loaded, messages(document)) for document in documents]
    config = EngineConfig(
        kv_cache_dtype=policy,
        kv_cache_memory=memory,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,
    )
    engine = Engine(loaded, config)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    replies: dict[str, list[int]] = {}
    prefill_seconds = decode_seconds = 0.0
    prompt_tokens = decoded = most = 0
    for step in drive(engine, prompts, params):
        most = max(most, step.sequences)
        if step.prompt_tokens:
            prompt_tokens += step.prompt_tokens
            prefill_seconds += step.seconds
        else:
            decoded += step.decoded
            decode_seconds += step.seconds
        for delta in step.deltas:
            replies.setdefault(delta.request_id, []).extend(delta.token_ids)
        progress(step.prompt_tokens + step.decoded)
    held = plan(loaded.geometry, [policy], CAPACITY_BYTES, [CAPACITY_TOKENS]).schemes[0].contexts[0]
    answers = [_answer(loaded, replies.get(str(i), [])) for i in range(len(documents))]
    return Showing(
        dtype=policy.label,
        sessions_admitted=most,
        sessions_capacity=held.sessions,
        kv_bytes_per_token=engine.pool.bytes_per_token(),
        prefill_tokens_per_s=prompt_tokens / prefill_seconds,
        decode_tokens_per_s=decoded / decode_seconds if decode_seconds else 0.0,
        kl_mean=fidelity.kl_mean,
        top1_agreement=fidelity.top1_agreement,
        answers_found=sum(d.found_in(a) for d, a in zip(documents, answers, strict=True)),
        answers_total=len(documents),
        preemptions=engine.stats.preemptions,
        seconds=prefill_seconds + decode_seconds,
        answers=tuple(answers),
    )


def _answer(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    """The text up to the model's end token."""
    ends = text.end_tokens(loaded)
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return text.decoder(loaded)(list(tokens[:stop])).strip()
