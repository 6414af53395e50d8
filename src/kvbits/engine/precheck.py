"""What arguments and a model's files can tell to be wrong, told before anything slow: on a CPU without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvbits.codecs.names import PolicyNames, parse_names
from kvbits.codecs.policy_document import read_names
from kvbits.config import AUTO, PAGE_TOKENS, POLICY_PREFIX, ModelGeometry, check_state_dtype, is_auto
from kvbits.engine.config import EngineConfig
from kvbits.errors import ConfigError, RequestError, UnsupportedError
from kvbits.memory import check_disk, check_host, show
from kvbits.models.formats import check_formats, on_cpu
from kvbits.models.outline import Outline, outline_of

if TYPE_CHECKING:
    from kvbits.codecs import Policy
    from kvbits.engine.speculation.config import SpeculativeConfig


def check_model(
    model: str,
    kv_cache_dtypes: Iterable[str | Policy] = (),
    *,
    dtype: str = "bfloat16",
    weights: str = "auto",
    device: str = "cpu",
    context: int | None = None,
) -> Outline:
    """Check that ``model`` is there, can be loaded as asked, stored in these dtypes, and has ``context`` tokens.

    Raises ``ConfigError`` or ``UnsupportedError`` naming what is wrong.
    """
    for name in kv_cache_dtypes:  # told even where the model is wrong too
        if isinstance(name, str) and not name.startswith(POLICY_PREFIX):
            parse_names(name, None)
    check_formats(dtype, weights, device)
    outline = outline_of(model)
    for name in kv_cache_dtypes:
        if isinstance(name, str):
            _check_dtype(name, outline)
    _check_context(context, model, outline.max_position)
    return outline


def check_engine(
    model: str,
    config: EngineConfig,
    speculative: SpeculativeConfig | None = None,
    *,
    dtype: str = "bfloat16",
    weights: str = "auto",
    device: str = "cpu",
) -> Outline:
    """:func:`check_model` for what a whole engine is asked for, its memory included."""
    check_room(config, device)
    named = [] if is_auto(config.kv_cache_dtype) else [config.kv_cache_dtype]
    outline = check_model(model, named, dtype=dtype, weights=weights, device=device)
    if config.max_model_len is not None and outline.max_position is not None:
        check_length(config.max_model_len, model, outline.max_position)
    if outline.geometry is not None:
        check_least(config.kv_cache_memory, outline.geometry)
        # Of 2 bits, the fewest.
        page = PAGE_TOKENS * outline.geometry.bytes_per_token_16bit() // 8
        if config.kv_offload_size is not None and config.kv_offload_size < page:
            raise ConfigError(
                f"kv_offload_size is {show(config.kv_offload_size)}; one page needs at least {show(page)}"
            )
    if speculative is not None and speculative.model is not None:
        draft = check_model(speculative.model, [speculative.kv_cache_dtype])
        check_no_states(draft, "a draft model's cache")
    check_states(outline, config.state_dtype, speculative)
    return outline


def check_states(outline: Outline, state_dtype: str, speculative: SpeculativeConfig | None = None) -> None:
    """Raise where recurrent states are asked for that the model surely does not have, or it has some that
    ``speculative`` has no place for."""
    check_state_dtype(state_dtype)
    if outline.geometry is not None:
        outline.geometry.stored_in(state_dtype)
    if speculative is not None and speculative.method == "self":
        check_no_states(outline, "the speculative method 'self'")


def check_geometry(
    geometry: ModelGeometry,
    kv_cache_dtypes: Iterable[str | Policy] = (),
    *,
    state_dtype: str = AUTO,
    kv_cache_memory: int | None = None,
    speculative: SpeculativeConfig | None = None,
    context: int | None = None,
) -> None:
    """The same of layers that were measured, before weights are read: for models whose files do not say it all."""
    _check_context(context, geometry.name, geometry.max_position)
    for name in kv_cache_dtypes:
        if isinstance(name, str) and not is_auto(name):
            _check_dtype(name, Outline(geometry.name, geometry.num_layers, geometry.max_position, geometry))
    if kv_cache_memory is not None:
        check_least(kv_cache_memory, geometry)
    geometry.stored_in(state_dtype)
    if speculative is not None and speculative.method == "self":
        geometry.refuse_states("the speculative method 'self'")
        geometry.refuse_latents("the speculative method 'self'")


def engine_check(
    config: EngineConfig, speculative: SpeculativeConfig | None = None
) -> Callable[[ModelGeometry, object], None]:
    """:func:`check_geometry` for what a whole engine is asked for, as :func:`kvbits.models.load_model` takes it."""

    def check(geometry: ModelGeometry, _: object) -> None:
        check_geometry(
            geometry, [config.kv_cache_dtype], state_dtype=config.state_dtype,
            kv_cache_memory=config.kv_cache_memory, speculative=speculative,
        )  # fmt: skip

    return check


def check_no_states(outline: Outline, what: str) -> None:
    """Raise ``UnsupportedError`` for a model that surely has recurrent layers; ``what`` has no place for states."""
    if outline.recurrent:
        raise UnsupportedError(f"{what} has no place for the states of recurrent layers; {outline.name} has such")


def check_chat(outline: Outline) -> None:
    """Raise ``RequestError`` for a model without a chat template."""
    if outline.has_template is False:
        raise RequestError(
            f"the tokenizer of {outline.name} has no chat template, as base models have none; "
            "use generate with a plain prompt"
        )


def check_length(asked: int, name: str, longest: int) -> None:
    """Raise ``ConfigError`` when ``max_model_len`` is more than a model's ``longest``."""
    if asked > longest:
        raise ConfigError(f"max_model_len is {asked}; the context of {name} is {longest} tokens")


def check_least(kv_cache_memory: int, geometry: ModelGeometry) -> None:
    """Raise ``ConfigError`` for a pool that holds no session of any dtype: its newest page is stored in 16 bits."""
    least = PAGE_TOKENS * geometry.bytes_per_token_16bit()
    if kv_cache_memory < least:
        raise ConfigError(f"kv_cache_memory is {show(kv_cache_memory)}; one session needs {show(least)}")


def check_room(config: EngineConfig, device: str) -> None:
    """Raise ``ConfigError`` when host memory or the disk cannot hold what ``config`` asks for; before a model loads.

    What a GPU has left is known when the model is there.
    """
    sizes = {"kv_cache_memory": config.kv_cache_memory} if on_cpu(device) else {}
    path = None if config.kv_offload_path is None else Path(config.kv_offload_path)
    if config.kv_offload_size is not None and path is None:
        sizes["kv_offload_size"] = config.kv_offload_size
    check_host(sizes)
    if config.kv_offload_size is not None and path is not None:
        folder = path if path.is_dir() else path.absolute().parent
        # What an earlier process left there is written over.
        left = path.stat().st_size if path.is_file() else 0
        if not folder.is_dir():
            raise ConfigError(f"kv_offload_path is '{path}'; there is no directory '{folder}'")
        check_disk("kv_offload_size", config.kv_offload_size - left, folder)


def _check_context(context: int | None, model: str, longest: int | None) -> None:
    if context is not None and longest is not None and context > longest:
        raise ConfigError(f"a context of {context} tokens is over the {longest} tokens of {model}")


def _check_dtype(name: str, outline: Outline) -> None:
    names: PolicyNames
    if name.startswith(POLICY_PREFIX):
        names = read_names(Path(name.removeprefix(POLICY_PREFIX)), outline.name, outline.num_layers)
    else:
        names = parse_names(name, outline.num_layers)
    if outline.geometry is not None:
        names.check(outline.geometry)
