"""Load a model through transformers and run it on a paged cache."""

from __future__ import annotations

import hashlib
import inspect
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kvbits.attention import IMPLEMENTATION, Forward, attend
from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels.decoder import WEIGHT_FORMS
from kvbits.models.control import ControlTokens
from kvbits.models.fused import FusedModel, fuse
from kvbits.models.geometry import geometry_of
from kvbits.models.hugepages import collapse_to_huge_pages
from kvbits.models.locate import Source, locate
from kvbits.models.packed import depends_on_rows, pack_linears
from kvbits.models.quiet import quiet

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_READ_ERRORS = (
    OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, ImportError, struct.error, SafetensorError
)  # fmt: skip
"""What transformers and its readers raise for files that are missing, cut off or not what they claim to be."""

_VOLATILE = frozenset(
    {"_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config"}
)
_SAMPLE = 16


@dataclass(frozen=True)
class LoadedModel:
    """A Hugging Face causal language model whose attention is :func:`kvbits.attention.attend`.

    ``fingerprint`` names configuration and weights (16 hex digits), whatever the dtype they are loaded in.
    """

    model: Any
    tokenizer: Any
    geometry: ModelGeometry
    name: str
    fingerprint: str
    fused: FusedModel | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, and its cache has to be."""
        device: torch.device = self.model.device
        return device

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The tokenizer's control tokens, which there has to be."""
        return ControlTokens(self.tokenizer)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, step: Forward, logits_rows: Tensor) -> Tensor:
        """Run one step.

        ``input_ids``, ``positions`` ``int64 [rows]``: the new tokens of all sequences of ``step.batch``, packed;
        ``logits_rows`` ``int64 [n]``: the rows whose logits are wanted. Returns ``float32 [n, vocab]``,
        on the CPU whatever the device.
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
        logits: Tensor = out.logits[0].float().cpu()
        return logits

    def depends_on_rows(self) -> str | None:
        """``None``, or why a token's result may depend on the other rows of its step (``--batch-invariant``)."""
        return depends_on_rows(self.model)


def load_model(
    name: str,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] | None = None,
    weights: str = "bf16",
    device: str = "cpu",
) -> LoadedModel:
    """Load ``name``: a packaged model, a ``.gguf`` file, a directory (safetensors or one GGUF) or a Hugging Face id.

    ``dtype`` is ``"bfloat16"`` or ``"float32"``; ``weights`` is ``"bf16"``, or ``"int8"``: the linear layers' weights
    in 8 bits with a scale for each output, for ``bfloat16`` on the CPU only; ``device`` is a torch device; ``progress``
    gets a line of text before each long stage. Raises ``ConfigError`` when the model cannot be found or read or the
    device cannot be used, ``UnsupportedError`` when kvbits cannot run the model.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown model dtype '{dtype}'; choose from {', '.join(_DTYPES)}")
    report = progress or (lambda line: None)
    if weights not in WEIGHT_FORMS:
        raise ConfigError(f"unknown weights '{weights}'; choose from {', '.join(WEIGHT_FORMS)}")
    if weights != "bf16" and dtype != "bfloat16":
        raise ConfigError(f"weights '{weights}' go with the model dtype bfloat16, not {dtype}")
    place = _device(device)
    if weights != "bf16" and place.type != "cpu":
        raise UnsupportedError(f"weights '{weights}' are multiplied on the CPU; the device is '{device}'")
    source = locate(name)
    report(f"Loading {name} ({dtype}) ..." if source.offline else f"Downloading and loading {name} ({dtype}) ...")
    # A GGUF file's configuration comes with its tensors; anything else is refused before a weight is read.
    config = None if source.gguf else _read(name, "configuration", AutoConfig, source)
    geometry = None if config is None else geometry_of(config, name)
    tokenizer = _read(name, "tokenizer", AutoTokenizer, source)
    register()
    options: dict[str, Any] = {"dtype": _DTYPES[dtype], "attn_implementation": IMPLEMENTATION}
    if source.gguf:
        options["quantization_config"] = GgufConfig(dequantize=True)
    model = _read(name, "weights", AutoModelForCausalLM, source, **options)
    loaded = wrap(model, tokenizer, name, geometry)
    if place.type != "cpu":
        model.to(place)
        return loaded
    packed = pack_linears(model, weights)  # after the fingerprint, which reads the plain weights
    if weights != "bf16" and not packed:
        raise UnsupportedError(f"the model '{name}' has no linear layer that can be stored as {weights}")
    if packed:
        fused = fuse(model, loaded.geometry, weights)
        if isinstance(fused, FusedModel):
            loaded = replace(loaded, fused=fused)
        else:
            report(f"The layers of {name} run as transformers' own code: {fused}")
    collapse_to_huge_pages()
    return loaded


def _device(name: str) -> torch.device:
    """Raises ``ConfigError`` for a device that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch tells of a missing driver by an assertion
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the device '{name}' cannot be used here: {reason}") from error
    return device


def wrap(model: Any, tokenizer: Any, name: str, geometry: ModelGeometry | None = None) -> LoadedModel:
    """Turn a Hugging Face causal language model that is already in memory into a :class:`LoadedModel`.

    The model's attention implementation becomes kvbits'. Raises ``UnsupportedError`` when kvbits cannot run it.
    """
    geometry = geometry or geometry_of(model, name)
    names = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "logits_to_keep"):
        if needed not in names:
            raise UnsupportedError(f"the model '{name}' takes no {needed}")
    register()
    model.eval().set_attn_implementation(IMPLEMENTATION)
    return LoadedModel(model, tokenizer, geometry, name, _fingerprint(model))


def register() -> None:
    """Make :func:`kvbits.attention.attend` known to transformers; again is harmless.

    No mask function is registered with it: for such an implementation transformers builds no masks.
    """
    AttentionInterface.register(IMPLEMENTATION, attend)


def _read(name: str, what: str, kind: Any, source: Source, **options: Any) -> Any:
    if source.gguf:
        options["gguf_file"] = source.gguf
    try:
        with quiet():
            return kind.from_pretrained(source.path, local_files_only=source.offline, **options)
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        where = f"{source.path}/{source.gguf}" if source.gguf else source.path
        raise ConfigError(
            f"cannot read the {what} of the model '{name}' ({where}): {type(error).__name__}: {reason}"
        ) from error


def _fingerprint(model: Any) -> str:
    """Hash the configuration, and name, shape and a few spread values (as bfloat16) of every parameter."""
    facts = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
