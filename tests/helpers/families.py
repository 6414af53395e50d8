"""What really happens to a tiny model of a family: loaded, fused, and its text and losses beside transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from helpers.hugging_face import hugging_face_model
from helpers.hybrids import answers, prompt
from helpers.latents import RoundedCache
from helpers.plain_rows import PlainRows
from helpers.serving import engine_of
from helpers.tiny import tiny_config, tiny_model
from helpers.zoo import UNSTEADY, ZOO
from kvbits.codecs import parse_policy
from kvbits.config import ModelGeometry
from kvbits.errors import UnsupportedError
from kvbits.hf import QuantizedCache
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.triton.format import refusal
from kvbits.models import geometry_of
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.fused_gpu import FusedGpuModel, fuse_on_gpu
from kvbits.models.load import wrap
from kvbits.models.packed import pack_linears

PROMPT, NEW = prompt(100, 5), 30
"""The answer crosses the end of a page; both are longer than every window and chunk."""

MOST_LOST = 1e-3
"""Nats a token, int8 beside 16 bit."""


@dataclass(frozen=True)
class Facts:
    """``parts``: what attention has; ``cpu``, ``gpu`` and ``cache``: how it runs there. Only ``reason`` if refused."""

    family: str
    reason: str = ""
    parts: str = ""
    cpu: str = ""
    gpu: str = ""
    cache: str = ""


def facts_of(family: str) -> Facts:
    """Try it all. Raises ``AssertionError`` where a text or a loss is not what it should be."""
    config = tiny_config(family, **ZOO[family])
    try:
        geometry = geometry_of(config)
    except UnsupportedError as error:
        return Facts(family, " ".join(str(error).split()))
    text = _own_text(family)
    _check_engine(family, geometry, _own_latents_text(family) if geometry.latent else text)
    cpu, gpu = _cpu(family), _gpu(family, geometry_of(config, latents=False))
    return Facts(family, "", _parts(geometry, config), cpu, gpu, _cache(family, geometry, text))


def _own_text(family: str) -> list[int]:
    """transformers' greedy answer from its own cache, keys and values in bfloat16."""
    model = hugging_face_model(family, **options_of(family))
    return _text(model)


def _text(model: Any, cache: Any = None) -> list[int]:
    found = model.generate(
        torch.tensor([PROMPT]), past_key_values=cache, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    return found[0, len(PROMPT) :].tolist()


def _own_latents_text(family: str) -> list[int]:
    """The same where what is in bfloat16 are latents, which that cache has too."""
    model = tiny_model(family, **options_of(family))
    return _text(model, RoundedCache(config=model.config))


def _check_engine(family: str, geometry: ModelGeometry, text: list[int]) -> None:
    """Beside another sequence, the prompt in parts."""
    model = tiny_model(family, **options_of(family))
    loaded = wrap(model, None, family, geometry)
    options = {"max_num_batched_tokens": 70, "max_num_seqs": 4, "kv_cache_memory": 8 << 20}
    engine = engine_of(loaded, kv_cache_dtype="bf16", **options)
    found = answers(engine, [prompt(9, 1), PROMPT], max_tokens=NEW)[1]
    assert found == text, f"{family}: the engine's greedy text is not transformers'\n{found}\n{text}"
    tokens = [*PROMPT, *text]
    exact, coded = (
        torch.cat([logits for _, logits in made.teacher_forced(tokens, 0)]).log_softmax(-1)
        for made in (engine, engine_of(loaded, kv_cache_dtype="int8", **options))
    )
    losses = (exact.exp() * (exact - coded)).sum(-1)
    loss = float(losses.median() if family in UNSTEADY else losses.mean())
    assert 0 <= loss < MOST_LOST, f"{family}: int8 loses {loss:.2e} nats"


def _parts(geometry: ModelGeometry, config: PreTrainedConfig) -> str:
    layers = geometry.layers
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers}
    with torch.device("meta"):
        experts = any(name.endswith("experts") for name in _module_names(config))
    found = {
        "windows": any(layer.window and not layer.chunked for layer in layers),
        "chunks": any(layer.chunked for layer in layers),
        "soft cap": any(layer.softcap for layer in layers),
        "sinks": any(layer.sinks for layer in layers),
        "shared keys and values": bool(geometry.shared),
        "recurrent layers": bool(geometry.states),
        "latents": geometry.latent,
        "keys and values of two sizes": any(g.key_dim != g.value_dim and not g.latent for g in layers),
        "layers of several shapes": len(shapes) > 1,
        "experts": experts,
    }
    return ", ".join(name for name, has in found.items() if has)


def _module_names(config: PreTrainedConfig) -> list[str]:
    from transformers import AutoModelForCausalLM

    return [name for name, _ in AutoModelForCausalLM.from_config(config).named_modules()]


def options_of(family: str) -> dict[str, Any]:
    """A router sends a token to every expert: else a last bit decides, and small models differ by much."""
    options = ZOO[family]
    config = tiny_config(family, **options)
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    count = next((count for count in counts if count), 0)
    if not count or not hasattr(config, "num_experts_per_tok"):
        return options
    groups = {"n_group": 1, "topk_group": 1} if hasattr(config, "n_group") else {}
    return {**options, **groups, "num_experts_per_tok": count}


def _cpu(family: str) -> str:
    loaded = wrap(tiny_model(family, **options_of(family)).to(torch.bfloat16), None, family)
    pack_linears(loaded.model)
    return "fused" if isinstance(fuse(loaded.model, loaded.geometry), FusedModel) else "layers"


def _gpu(family: str, geometry: ModelGeometry) -> str:
    (scheme,) = set(parse_policy("int8", geometry.num_layers).layers)
    if geometry.states or any(refusal(scheme, layer) for layer in geometry.layers):
        return "no"
    model = wrap(tiny_model(family, **options_of(family)), None, family, geometry).model
    found = fuse_on_gpu(model, geometry, CpuBackend(), PlainRows())
    return "fused" if isinstance(found, FusedGpuModel) else "layers"


def _cache(family: str, geometry: ModelGeometry, text: list[int]) -> str:
    model = tiny_model(family, **options_of(family))
    try:
        cache = QuantizedCache(model, "bf16", kv_cache_memory="16MiB")
    except UnsupportedError:
        assert geometry.states, family
        return "no"
    found = _text(model, cache)
    assert found == text, f"{family}: generate with kvbits' cache is not transformers'\n{found}\n{text}"
    return "yes"
