"""The parts of an engine, made to fit each other."""

from __future__ import annotations

import logging

from kvbits.codecs import Policy
from kvbits.codecs.states import StateLayout
from kvbits.config import PAGE_TOKENS
from kvbits.engine.config import EngineConfig
from kvbits.engine.limits import RequestLimits
from kvbits.engine.offload import tier_of
from kvbits.engine.precheck import check_least, check_length
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels import Backend
from kvbits.memory import show
from kvbits.models import LoadedModel
from kvbits.pages import PageGroup, PageManager, StateSlots
from kvbits.pool import PagedPool, StatePool

log = logging.getLogger(__name__)


def context_of(loaded: LoadedModel, config: EngineConfig) -> int:
    """Tokens that a request may have; raises ``ConfigError`` when more are asked for than the model can do."""
    longest = loaded.geometry.max_position
    asked = config.max_model_len or longest
    check_length(asked, loaded.name, longest)
    return asked


def check_fit(loaded: LoadedModel, config: EngineConfig, backend: Backend) -> None:
    """Raise ``ConfigError`` or ``UnsupportedError`` for what no cache dtype can mend; before one is measured."""
    check_heads(loaded, config)
    check_invariance(loaded, config, backend)
    context_of(loaded, config)
    check_least(config.kv_cache_memory, loaded.geometry)
    states = StateLayout.of(loaded.geometry.stored_in(config.state_dtype), loaded.compute_dtype.itemsize)
    if states is not None:
        states.slots(config.kv_cache_memory, config.max_num_seqs)


def check_heads(loaded: LoadedModel, config: EngineConfig) -> None:
    """Raise ``ConfigError`` for a model that was loaded for cached latents where every head's keys are asked for."""
    if config.disable_mla and loaded.geometry.latent:
        raise ConfigError(
            f"disable_mla is asked for, and {loaded.name} was loaded for cached latents; give it to load_model too"
        )


def policy_of(loaded: LoadedModel, config: EngineConfig, backend: Backend) -> Policy:
    """The cache policy; raises ``UnsupportedError`` where ``backend`` cannot run a layer as the policy stores it."""
    policy = loaded.policy(config.kv_cache_dtype)
    for schemes in (policy.layers, policy.sink or ()):
        for index, (scheme, layer) in enumerate(zip(schemes, loaded.geometry.layers, strict=bool(schemes))):
            reason = backend.supports(scheme, layer)
            if reason:
                raise UnsupportedError(f"layer {index} of {loaded.name} cannot be stored as '{scheme.name}': {reason}")
    return policy


def check_invariance(loaded: LoadedModel, config: EngineConfig, backend: Backend) -> None:
    """Raise ``UnsupportedError`` where bit-identical answers are asked for and layers or kernels do not give them."""
    if not config.batch_invariant:
        return
    reason = loaded.depends_on_rows()
    if not backend.batch_invariant:
        reason = f"the kernels of the backend '{backend.name}' round by the number of new tokens"
    if reason:
        raise UnsupportedError(f"batch_invariant cannot be kept with {loaded.name} here: {reason}")


def states_of(loaded: LoadedModel, config: EngineConfig) -> StatePool | None:
    """The memory of recurrent layers, of which the model may have none; raises ``ConfigError`` when it is too small."""
    geometry = loaded.geometry.stored_in(config.state_dtype)
    layout = StateLayout.of(geometry, loaded.compute_dtype.itemsize)
    if layout is None:
        return None
    slots = layout.slots(config.kv_cache_memory, config.max_num_seqs)
    if slots < config.max_num_seqs:
        log.warning(
            "At most %d sequences run at once, not %d: the recurrent layers of %s keep %s of each.",
            slots, config.max_num_seqs, loaded.name, show(layout.slot_bytes),
        )  # fmt: skip
    return StatePool(geometry, slots, loaded.compute_dtype, loaded.device, config.batch_invariant)


def recurrent_line(states: StatePool | None) -> str:
    """Which layers are recurrent and how they run, for users to read; empty where none is."""
    if states is None:
        return ""
    places = sorted({state.layer for state in states.geometry.states})
    how = "one after another, token by token" if states.single else "prompts one after another, next tokens together"
    return (
        f"{len(places)} recurrent layers ({', '.join(map(str, places))}) run as transformers' code, "
        f"{how}; {show(states.slot_bytes)} of states a sequence{states.stored}, in {states.num_slots} slots"
    )


def pages_of(pool: PagedPool, loaded: LoadedModel, config: EngineConfig) -> PageManager:
    """The manager of ``pool``'s frames."""
    layout, states = pool.layout, pool.states
    longest, tier = -(-context_of(loaded, config) // PAGE_TOKENS), tier_of(pool, config)
    return PageManager(
        pool.num_frames,
        layout.open.frames,
        layout.sealed.frames,
        enable_prefix_caching=config.enable_prefix_caching,
        cache_key=f"{loaded.fingerprint}|{pool.policy.name}".encode(),
        sink_frames=layout.sink.frames if layout.sink else None,
        tier=tier,
        groups=[PageGroup(1, group.first_frames, group.kept) for group in layout.groups],
        move=pool.copy if layout.adjacent else None,
        states=None if states is None else StateSlots(states.num_slots, longest, states.copy, tier),
    )


def limits_of(pool: PagedPool, context: int, config: EngineConfig) -> RequestLimits:
    """What one request may use when it has the pool to itself."""
    longest = pool.layout.longest_context(pool.buffer.nbytes)
    return RequestLimits(pool.geometry.vocab_size, context, longest, config.kv_cache_memory)
