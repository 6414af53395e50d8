"""What the cache must know of a model, found by looking at what its attention layers really ask for.

A copy of the model without memory (torch's ``meta`` device) runs one token through a recording attention function. So
scale, window, soft cap, sinks and head sizes are those that the layers pass, for any family, and nothing is read from
attribute names that a family may use differently. Masks are observed too: the mask function that the model builds is
evaluated at a far position, which tells a window from a chunk and causal from bidirectional.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from kvbits.attention import refuse_keywords
from kvbits.config import LayerGeometry, ModelGeometry, StateShape
from kvbits.errors import UnsupportedError
from kvbits.models.latents import Absorbed, absorb
from kvbits.models.positions import Valued, changes_factors, rope_types, switch_of
from kvbits.models.quiet import quiet
from kvbits.models.recurrent import note_states
from kvbits.models.trust import trusted

_TRIAL = "kvbits-trial"
_FAR = 1 << 20
"""A query position beyond every window, and a multiple of every chunk size in use."""

_ODD = 1 << 40
"""In the place of a mask that is none of kvbits'."""

_LAYER_TYPES = frozenset({
    "full_attention", "sliding_attention", "dense", "sparse", "moe", "mlp", "linear_attention", "conv", "hybrid",
    "hybrid_sliding", "chunked_attention",
})  # fmt: skip
_PLAIN = frozenset({"moe", "mlp"})
"""Those that look at one token only."""

_HEAD_MULTIPLE = 16
_LARGEST = 576
"""Elements of a latent and its rotary key that the kernels take."""


@dataclass
class _Recorder:
    """Travels through the trial pass in the place of the step's context."""

    layers: dict[int, LayerGeometry] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of each layer that has its own."""
    states: dict[int, list[StateShape]] = field(default_factory=dict)
    rotary: list[nn.Module] = field(default_factory=list)
    """Rotary embeddings of LongRoPE."""
    latents: bool = True
    expanded: str = ""
    odd: str = ""
    """Why latents that the layers hand over cannot be cached."""


def geometry_of(
    model: PreTrainedConfig | PreTrainedModel,
    name: str = "",
    max_model_len: int | None = None,
    latents: bool = True,
) -> ModelGeometry:
    """Measure ``model`` or a model of this configuration; no weights are needed.

    ``max_model_len``: the longest sequence that is wanted. A LongRoPE model has the context of its short factors unless
    more is, and always where its code never takes the long ones. ``latents``: multi-head latent attention caches its
    latents where the family's code lets it; else, and where ``latents`` is false, every head's keys and values. Raises
    ``UnsupportedError`` naming whatever kvbits cannot do.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    text = config.get_text_config(decoder=True)
    _refuse_config(config, text)
    recorder = _Recorder(latents=latents)
    _trial(config, recorder)
    if recorder.states and any(layer.latent for layer in recorder.layers.values()):
        recorder.odd = "it has recurrent layers too"
    if recorder.odd:
        odd, recorder = recorder.odd, _Recorder(latents=False)
        _trial(config, recorder)
        recorder.expanded = odd
    kinds = enumerate(getattr(text, "layer_types", None) or ())
    known = {*recorder.layers, *recorder.shared, *recorder.states, *(place for place, kind in kinds if kind in _PLAIN)}
    missing = sorted(set(range(text.num_hidden_layers)) - known)
    if missing or len(known) != text.num_hidden_layers or not recorder.layers:
        raise UnsupportedError(
            f"layers {missing or sorted(known)} of this {config.model_type} model do not use attention, or in a way of "
            "their own; kvbits caches keys and values, and the states of recurrent layers that stand beside attention"
        )
    places = tuple(sorted(recorder.layers))
    return ModelGeometry(
        name or config.model_type,
        tuple(recorder.layers[place] for place in places),
        _context(text, max_model_len, recorder.rotary),
        int(text.vocab_size),
        () if places == tuple(range(len(places))) else places,
        tuple(state for place in sorted(recorder.states) for state in recorder.states[place]),
        tuple(sorted(recorder.shared.items())),
        recorder.expanded,
    )


def _context(text: Any, wanted: int | None, rotary: list[nn.Module]) -> int:
    longest, switch = int(text.max_position_embeddings), switch_of(text)
    if switch is None:
        return longest
    return longest if (wanted or 0) > switch and all(changes_factors(module, switch) for module in rotary) else switch


def _refuse_config(config: Any, text: Any) -> None:
    """What a trial pass of one token would not show."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind} is an encoder-decoder model; kvbits serves decoder-only models")
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None):
        raise UnsupportedError(f"this {kind} model attends in both directions; kvbits is causal")
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if odd:
        raise UnsupportedError(
            f"this {kind} model has layers of type {', '.join(odd)}; kvbits does full, sliding and chunked attention"
        )
    for rope in sorted(_rope_types(getattr(text, "rope_parameters", None))):
        if rope == "dynamic":
            raise UnsupportedError(
                f"the rotary embedding '{rope}' of this {kind} model changes with the "
                "longest sequence of a step, which cached keys cannot follow"
            )
    if getattr(text, "max_position_embeddings", None) is None:
        raise UnsupportedError(f"the configuration of this {kind} model has no max_position_embeddings")


def _rope_types(parameters: Any) -> set[str]:
    """Every ``rope_type``, also of configurations with one set of parameters per layer type."""
    if not isinstance(parameters, dict):
        return set()
    found = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return found.union(*(_rope_types(p) for p in parameters.values()))


def _trial(config: Any, recorder: _Recorder) -> None:
    AttentionInterface.register(_TRIAL, _record)
    AttentionMaskInterface.register(_TRIAL, _observe_mask)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # the one way through a mixture of experts whose shapes do not depend on the data
    config._experts_implementation = "batched_mm"
    kind = config.model_type
    try:
        with quiet(), torch.device("meta"), no_init_weights(), torch.inference_mode():
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=_TRIAL, dtype=torch.float32, trust_remote_code=trusted(config)
            ).eval()
            note_states(model, recorder.states)
            recorder.rotary = [part for part in model.modules() if "longrope" in rope_types(part)]
            for part in recorder.rotary:
                part.forward = Valued(part)
            for part in model.modules():
                if type(part).__name__.endswith("Experts"):
                    part.forward = _unrouted(part.forward)
            recorder.expanded = (absorb(model, _TRIAL) if recorder.latents else None) or ""
            if not (model._supports_attention_backend or model._can_set_attn_implementation()):
                raise UnsupportedError(
                    f"the {kind} model's code does not let its attention be replaced (no attention backend)"
                )
            model(
                input_ids=torch.zeros(1, 1, dtype=torch.long),
                position_ids=torch.zeros(1, 1, dtype=torch.long),
                attention_mask=torch.ones(
                    1, 1, dtype=torch.long
                ),  # else packed sequences are looked for in the positions
                use_cache=False,
                kvbits=recorder,
                logits_to_keep=torch.zeros(1, dtype=torch.long),
            )
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, KeyError) and error.args == (_TRIAL,):
            raise UnsupportedError(
                f"the {kind} model's code does not let its attention be replaced (it chooses from its own)"
            ) from error
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, NotImplementedError):
            raise UnsupportedError(
                f"the {kind} model's code goes by values that its layers compute, which a trial pass without weights "
                "has not"
            ) from error
        if "not on the expected device" in reason:  # it met the mask, the one tensor that has a value
            raise UnsupportedError(f"layers of the {kind} model build their attention mask in their own way") from error
        raise UnsupportedError(
            f"a trial pass through the {kind} model failed: {type(error).__name__}: {reason}"
        ) from error


def _unrouted(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Experts that go by the router's choices, which are not there: they give rows like those that they are given."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return own(hidden_states, *args, **kwargs)
        except NotImplementedError:
            return torch.empty_like(hidden_states)

    return forward


def _observe_mask(*, mask_function: Any, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
    """In the place of a mask: what ``mask_function`` implies, ``int64 [1, 1, 1, 1]``, 0 for all tokens up to the query,
    the size of a window, the negative size of chunks, or :data:`_ODD`: a model may build masks that no layer uses."""
    _bring_to_cpu(mask_function)
    before, far = (_visible(mask_function, query) for query in (_FAR - 1, _FAR))
    if before is None or far is None:
        window = _ODD
    elif (before, far) == (_FAR, _FAR + 1):
        window = 0
    elif before == far:
        window = far
    else:
        window = -_chunk(mask_function, far)
    return torch.full((1, 1, 1, 1), window, device="cpu")


def _bring_to_cpu(function: Any) -> None:
    """Tensors that a mask function has caught on ``meta`` count the padding of the trial's one token: none."""
    for cell in getattr(function, "__closure__", None) or ():
        caught = cell.cell_contents
        if isinstance(caught, Tensor) and caught.device.type == "meta":
            cell.cell_contents = torch.zeros_like(caught, device="cpu")
        for part in caught if isinstance(caught, tuple) else (caught,):
            if callable(part):
                _bring_to_cpu(part)


def _chunk(mask_function: Any, span: int) -> int:
    """The size of the chunks that texts are cut into, where a far query sees ``span`` keys; ``-_ODD`` for none."""
    size = _visible(mask_function, _FAR - span)  # the last query of the chunk before the far one's
    tried = () if size is None else (size - 1, size, size + 1, _FAR - 1, _FAR)
    if size is None or any(_visible(mask_function, query) != query % size + 1 for query in tried):
        return -_ODD
    return size


def _visible(mask_function: Any, query: int) -> int | None:
    """Keys that ``query`` sees; ``None`` where they are not the last ones up to itself."""
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    keys = torch.arange(query + 2, device="cpu")
    seen = mask_function(zero, zero, torch.tensor(query, device="cpu"), keys)
    seen = torch.as_tensor(seen, device="cpu").expand(query + 2).nonzero().flatten()
    if len(seen) == 0 or int(seen[-1]) != query or len(seen) != query + 1 - int(seen[0]):
        return None
    return len(seen)


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of the trial pass: note what layer ``module`` asks for."""
    recorder: _Recorder | None = kwargs.get("kvbits")
    index: Any = module.layer_idx
    if recorder is None:
        raise UnsupportedError(
            f"layer {index} does not hand its keywords on to its attention, which is so not told of the step"
        )
    refuse_keywords(kwargs)
    if index in recorder.layers or index in recorder.shared:
        raise UnsupportedError(f"layer {index} calls its attention more than once in a step")
    if attention_mask is None or attention_mask.shape != (1, 1, 1, 1) or attention_mask.device.type != "cpu":
        raise UnsupportedError(f"layer {index} builds its attention mask in its own way")
    if int(attention_mask) == _ODD:
        raise UnsupportedError(f"the attention mask of layer {index} is neither causal nor a causal window nor chunks")
    chunked, window = int(attention_mask) < 0, abs(int(attention_mask)) or None
    if "sliding_window" in kwargs and kwargs["sliding_window"] != (None if chunked else window):
        raise UnsupportedError(
            f"layer {index} masks a window of {window} but asks for sliding_window={kwargs['sliding_window']}"
        )
    heads, kv_heads, key_dim, value_dim = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
    found = getattr(module, "expand_kv", None)
    latents = found if isinstance(found, Absorbed) else None
    if (
        query.shape[3] != (key_dim if latents is None else latents.query_dim)
        or value.shape[1] != kv_heads
        or heads % kv_heads
    ):
        raise UnsupportedError(
            f"layer {index} has queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)}"
        )
    if latents is not None and (key_dim % _HEAD_MULTIPLE or value_dim % _HEAD_MULTIPLE or key_dim > _LARGEST):
        recorder.odd = f"its latents of {value_dim} and rotary keys of {key_dim - value_dim} elements fit no page"
        return query.new_empty(1, query.shape[2], heads, latents.head_dim), None
    for what, dim in (("key", key_dim), ("value", value_dim)):
        if dim % _HEAD_MULTIPLE:
            raise UnsupportedError(
                f"layer {index} has {what} heads of size {dim}; kvbits needs a multiple of {_HEAD_MULTIPLE}"
            )
    scale = kwargs.get("scaling")
    layer = LayerGeometry(
        num_heads=heads,
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        window=window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux") is not None,
        chunked=chunked,
        latent=latents is not None,
    )
    source = next((i for i, (k, v) in recorder.stored.items() if k is key and v is value), None)
    if source is None:
        recorder.layers[index], recorder.stored[index] = layer, (key, value)
    elif layer == recorder.layers[source]:
        recorder.shared[index] = source
    else:
        raise UnsupportedError(
            f"layer {index} shares the keys and values of layer {source} and attends in another way: {layer} is not "
            f"{recorder.layers[source]}"
        )
    return query.new_empty(1, query.shape[2], heads, value_dim if latents is None else latents.head_dim), None
