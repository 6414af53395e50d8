"""Load a model through transformers and run it on a paged cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvbits.attention import IMPLEMENTATION, Forward, attend
from kvbits.codecs import Policy, policy_of
from kvbits.config import ModelGeometry
from kvbits.errors import UnsupportedError
from kvbits.kernels import GPUS
from kvbits.kernels.hugepages import collapse_to_huge_pages
from kvbits.models.control import ControlTokens
from kvbits.models.device import find_device
from kvbits.models.fingerprint import fingerprint, of_heads
from kvbits.models.formats import check_formats
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.geometry import geometry_of
from kvbits.models.latents import absorb, absorbed, differing, has_latents, release
from kvbits.models.locate import locate
from kvbits.models.packed import depends_on_rows, pack_linears, packed_weights, round_linears, settle
from kvbits.models.positions import settle_rotary, tell_positions
from kvbits.models.reader import Reader
from kvbits.models.recurrent import dtype_of, mixers_of, split, try_cuts
from kvbits.models.sampling import sampling_defaults

if TYPE_CHECKING:  # it imports Triton
    from kvbits.models.fused_gpu import FusedGpuModel

log = logging.getLogger(__name__)

Check = Callable[[ModelGeometry, Any], None]
"""What a command refuses of a model's geometry and configuration."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A Hugging Face causal language model whose attention is :func:`kvbits.attention.attend`.

    ``fingerprint`` names configuration and weights (16 hex digits), whatever the dtype they are loaded in, and whether
    latents or every head's keys and values are cached.
    """

    model: Any
    tokenizer: Any
    geometry: ModelGeometry
    name: str
    fingerprint: str
    fused: FusedModel | FusedGpuModel | None = None
    trust_remote_code: bool = False
    """Whether code that comes with a model was allowed to run; a draft model's is then too."""
    weights: str = "auto"
    """The form of the weights that was asked for (:data:`kvbits.config.WEIGHT_FORMATS`)."""

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, and its cache has to be."""
        device: torch.device = self.model.device
        return device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What recurrent layers compute in."""
        mixers = mixers_of(self.model)
        found: torch.dtype = dtype_of(next(iter(mixers.values()))) if mixers else self.model.dtype
        return found

    def policy(self, dtype: str | Policy) -> Policy:
        """A KV cache dtype as a policy of this model. Raises as :func:`kvbits.codecs.policy_of`."""
        return policy_of(dtype, self.geometry, self.fingerprint)

    @cached_property
    def sampling_defaults(self) -> dict[str, float]:
        """What the model's generation configuration says of how tokens are chosen, by the names of the parameters."""
        return sampling_defaults(getattr(self.model, "generation_config", None))

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The tokenizer's control tokens, which there has to be."""
        return ControlTokens(self.tokenizer)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, step: Forward, logits_rows: Tensor) -> Tensor:
        """Run one step.

        ``input_ids``, ``positions`` ``int64 [rows]``: the new tokens of all sequences of ``step.batch``, packed;
        ``logits_rows`` ``int64 [n]``: the rows whose logits are wanted. Returns ``float32 [n, vocab]`` on the model's
        device.
        """
        if self.fused is not None and self.fused.runs(step):
            return self.fused.forward(input_ids, positions, step, logits_rows)
        device = self.device
        out = self.model(
            input_ids=input_ids.unsqueeze(0).to(device),
            position_ids=positions.unsqueeze(0).to(device),
            use_cache=False,
            logits_to_keep=logits_rows.to(device),
            kvbits=step,
        )
        logits: Tensor = out.logits[0].float()
        return logits

    def depends_on_rows(self) -> str | None:
        """``None``, or why a token's result may depend on the other rows of its step (``--batch-invariant``).

        Recurrent layers run token by token then.
        """
        parts = nn.ModuleList(part for latents in absorbed(self.model) for part in latents.parts())
        apart = {part for mixer in mixers_of(self.model).values() for part in mixer.modules()}
        return depends_on_rows(self.model, isinstance(self.fused, FusedModel), apart) or depends_on_rows(parts)


def load_model(
    name: str,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] | None = None,
    weights: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    max_model_len: int | None = None,
    disable_mla: bool = False,
    check: Check | None = None,
) -> LoadedModel:
    """Load ``name``: a packaged model, a ``.gguf`` file, a directory (safetensors or one GGUF) or a Hugging Face id.

    ``dtype`` is ``"bfloat16"`` or ``"float32"``. ``weights`` are those of linear layers and embeddings: ``"auto"``, the
    file's own bits (unpacked for ``float32`` and on a GPU); ``"bf16"``, unpacked; ``"int8"`` and ``"int4"``,
    rounded in groups of 32 with a scale each, on the CPU only (in ``float32`` the rounded values are unpacked again).
    ``device`` is a torch device; ``progress``
    gets a line of text before each long stage; ``trust_remote_code`` runs Python code that comes with the model, which
    is refused otherwise. ``max_model_len``: the longest sequence to come; over the first context of a LongRoPE model
    (Phi-3 and 4 of 128K) it takes the long factors, for all its tokens, else the short ones. ``disable_mla``:
    multi-head latent attention caches every head's keys and values, not latents. ``check`` is given the geometry and
    the configuration before a weight is read, to refuse what a command cannot do with such a model. Raises
    ``ConfigError`` when the model cannot be found or read or the device cannot be used, ``UnsupportedError`` when
    kvbits cannot run the model.
    """
    check_formats(dtype, weights, device)
    report = progress or (lambda line: None)
    rounded = weights not in ("auto", "bf16")
    place = find_device(device)
    source = locate(name)
    report(f"Loading {name} ({dtype}) ..." if source.offline else f"Downloading and loading {name} ({dtype}) ...")
    reader = Reader(name, source, trust_remote_code)
    # refused before a weight is read
    geometry = geometry_of(reader.configuration(), name, max_model_len, place.type == "cpu" and not disable_mla)
    if place.type != "cpu":
        geometry.refuse_states(f"the cache on '{device}'")
    if check is not None:
        check(geometry, reader.configuration())
    register()
    packs = dtype == "bfloat16" and place.type == "cpu"
    weights_of = reader.weights(_DTYPES[dtype], IMPLEMENTATION, packs and weights == "auto", packs)
    tokenizer = reader.tokenizer()
    model = weights_of()
    loaded = wrap(model, tokenizer, name, geometry, tried=False)
    loaded = replace(loaded, trust_remote_code=trust_remote_code, weights=weights)
    if place.type != "cpu":
        model.to(place)
        return fused_on_gpu(_with_latents(loaded), report)
    if rounded and dtype == "float32":
        round_linears(model, weights)  # after the fingerprint, which reads the plain weights
        try_cuts(model, geometry)
        return _with_latents(loaded)
    packed = pack_linears(model, weights if rounded else "bf16")
    settle(model, _DTYPES[dtype])
    try_cuts(model, geometry)
    loaded = _with_latents(loaded)
    for latents in absorbed(model):
        latents.settle()
    if rounded and not packed:
        raise UnsupportedError(f"the model '{name}' has no linear layer that can be stored as {weights}")
    if packed or any(packed_weights(model)):
        fused = fuse(model, loaded.geometry)
        if isinstance(fused, FusedModel):
            loaded = replace(loaded, fused=fused)
        else:
            report(_plain_line(name, fused))
            collapse_to_huge_pages()  # weights that are not packed
    return loaded


def wrap(
    model: Any, tokenizer: Any, name: str, geometry: ModelGeometry | None = None, tried: bool = True
) -> LoadedModel:
    """Turn a Hugging Face causal language model that is already in memory into a :class:`LoadedModel`.

    The model's attention implementation becomes kvbits'; on a GPU its layers run fused where they can. ``tried``: its
    recurrent layers are run once, which takes weights as they will be used. Raises ``UnsupportedError`` when kvbits
    cannot run it.
    """
    geometry = geometry or geometry_of(model, name, latents=model.device.type == "cpu")
    if model.device.type != "cpu":
        geometry.refuse_states(f"the cache on '{model.device}'")
    names = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "logits_to_keep"):
        if needed not in names:
            raise UnsupportedError(f"the model '{name}' takes no {needed}")
    register()
    model.eval().set_attn_implementation(IMPLEMENTATION)
    split(model)
    tell_positions(model)
    settle_rotary(model, geometry)
    if geometry.latent:
        absorb(model)
    else:
        release(model)
    loaded = LoadedModel(model, tokenizer, geometry, name, fingerprint(model))
    if tried:
        try_cuts(model, geometry)
        loaded = _with_latents(loaded)
    return fused_on_gpu(loaded, log.info)


def _with_latents(loaded: LoadedModel) -> LoadedModel:
    """``loaded`` itself, or with expanded heads where its logits with cached latents are others."""
    model, geometry = loaded.model, loaded.geometry
    if geometry.latent:
        expanded = replace(geometry_of(model, loaded.name, latents=False), max_position=geometry.max_position)
        reason = differing(model, geometry, expanded)
        geometry = geometry if reason is None else replace(expanded, expanded=reason)
    if geometry.expanded:
        log.warning("%s caches every head's keys and values instead of latents: %s", loaded.name, geometry.expanded)
    own = loaded.fingerprint
    return replace(
        loaded, geometry=geometry, fingerprint=of_heads(own) if has_latents(model) and not geometry.latent else own
    )


def fused_on_gpu(loaded: LoadedModel, report: Callable[[str], None]) -> LoadedModel:
    """``loaded`` with fused layers where it is on a GPU and they can be; else ``report`` gets the reason."""
    if loaded.device.type not in GPUS:
        return loaded
    try:
        from kvbits.models.fused_gpu import fuse_on_gpu
    except ImportError as error:
        found: FusedGpuModel | str = f"it needs Triton ({error})"
    else:
        found = fuse_on_gpu(loaded.model, loaded.geometry)
    if isinstance(found, str):
        report(_plain_line(loaded.name, found))
        return loaded
    return replace(loaded, fused=found)


def _plain_line(name: str, reason: str) -> str:
    return f"The layers of {name} run as transformers' own code: {reason}"


def register() -> None:
    """Make :func:`kvbits.attention.attend` known to transformers; again is harmless.

    No mask function is registered with it: for such an implementation transformers builds no masks.
    """
    AttentionInterface.register(IMPLEMENTATION, attend)
