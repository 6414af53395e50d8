"""The proposer of each method."""

from __future__ import annotations

import dataclasses

from kvbits.codecs import Codec, Policy
from kvbits.engine.config import EngineConfig
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.setup import pages_of, policy_of
from kvbits.engine.speculation.by_model import DraftModelProposer, SelfProposer
from kvbits.engine.speculation.config import SpeculativeConfig
from kvbits.engine.speculation.ngram import NgramProposer
from kvbits.engine.speculation.proposer import Proposer
from kvbits.errors import ConfigError
from kvbits.kernels import default_backend
from kvbits.models import LoadedModel, load_model
from kvbits.pages import PageManager
from kvbits.pool import PagedPool

_DRAFTS = "a draft model's cache"


def proposer_of(
    speculative: SpeculativeConfig, loaded: LoadedModel, config: EngineConfig, runner: ModelRunner, pages: PageManager
) -> Proposer:
    """What guesses tokens for ``loaded``, which ``runner`` runs on ``pages``.

    Raises ``ConfigError`` where the method does not fit the model or its cache.
    """
    if speculative.method == "ngram":
        return NgramProposer(speculative.prompt_lookup_min, speculative.prompt_lookup_max)
    if speculative.method == "self":
        loaded.geometry.refuse_states("the speculative method 'self'")
        loaded.geometry.refuse_latents("the speculative method 'self'")
        if not _has_drafts(runner.policy):
            raise ConfigError(
                f"the speculative method 'self' needs pages that can be read in part; '{runner.policy.name}' has none, "
                "'int8h' has"
            )
        return SelfProposer(runner, pages)
    assert speculative.model is not None
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    draft = load_model(
        speculative.model, dtype=dtype, device=str(loaded.device), trust_remote_code=loaded.trust_remote_code,
        max_model_len=config.max_model_len or loaded.geometry.max_position, disable_mla=config.disable_mla,
        check=lambda geometry, _: geometry.refuse_states(_DRAFTS),
    )  # fmt: skip
    return draft_model(draft, speculative, loaded, config)


def draft_model(
    draft: LoadedModel, speculative: SpeculativeConfig, loaded: LoadedModel, config: EngineConfig
) -> DraftModelProposer:
    """``draft`` as the proposer for ``loaded``, on a pool of its own.

    Raises ``ConfigError`` when the models' tokens differ or the draft's context is too short, ``UnsupportedError``
    where the kernels cannot store it as asked.
    """
    _check_tokens(draft, loaded)
    draft.geometry.refuse_states(_DRAFTS)
    longest = config.max_model_len or loaded.geometry.max_position
    if draft.geometry.max_position < longest:
        raise ConfigError(
            f"the draft model {draft.name} has a context of {draft.geometry.max_position} tokens; {longest} are needed"
        )
    own = dataclasses.replace(
        config, kv_cache_dtype=speculative.kv_cache_dtype, kv_cache_memory=speculative.memory_bytes,
        kv_offload_size=None, kv_offload_path=None,
    )  # fmt: skip
    backend = default_backend(str(draft.device))
    policy, freed = policy_of(draft, own, backend), backend.layer_groups
    pool = PagedPool(draft.geometry, policy, own.kv_cache_memory, device=draft.device, free_windows=freed)
    pages = pages_of(pool, draft, own)
    return DraftModelProposer(ModelRunner(draft, pool, pages, backend), pages, config.max_num_batched_tokens)


def _has_drafts(policy: Policy) -> bool:
    codecs = [codec for scheme in policy.layers for codec in (scheme.key, scheme.value)]
    return any(type(codec).decode_draft is not Codec.decode_draft for codec in codecs)


def _check_tokens(draft: LoadedModel, loaded: LoadedModel) -> None:
    sizes = draft.geometry.vocab_size, loaded.geometry.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the draft model {draft.name} has {sizes[0]} tokens, {loaded.name} has {sizes[1]}")
    if draft.tokenizer is not None and loaded.tokenizer is not None:
        theirs, ours = draft.tokenizer.get_vocab(), loaded.tokenizer.get_vocab()
        wrong = next((token for token, index in ours.items() if theirs.get(token) != index), None)
        if wrong is not None:
            raise ConfigError(f"the draft model {draft.name} numbers the token {wrong!r} unlike {loaded.name}")
