"""The facts that a plan needs of a model, whatever names it: a table, a configuration file, or a model on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.geometry import geometry_of
from kvbits.models.held import blank, held
from kvbits.models.locate import Source, is_packaged, locate
from kvbits.models.quiet import quiet
from kvbits.models.reader import Reader
from kvbits.planning.facts import ModelFacts, Parameters, facts_of_config, known_facts
from kvbits.planning.hf_config import MLA

_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, StrictDataclassError)


def facts_of_model(name: str, mla: MLA = "latent", trust_remote_code: bool = False) -> ModelFacts:
    """Facts of ``name``: one of the tables' models, a ``config.json`` or a directory with one, a model that loads.

    No weights are read. A configuration's geometry is measured on a copy without memory, as the engine does. Raises
    ``ConfigError`` when there is no such model, ``UnsupportedError`` when kvbits could not cache it.
    """
    known = known_facts(name, mla)
    if known is not None and not is_packaged(name):
        return known
    config, source, reader = _config(name, trust_remote_code)
    parameters, sizes = parameters_of(config), _held(config, reader)
    fields = config.to_dict()
    return facts_of_config(
        name,
        source,
        fields,
        parameters.total,
        parameters.embeddings,
        parameters.experts,
        weights="auto" if sizes else _published(_quantization(config)),
        mla=mla,
        geometry=geometry_of(config, name, _longest(config), mla == "latent"),
        held=sizes,
    )


def _longest(config: PreTrainedConfig) -> int | None:
    """The whole context, which a LongRoPE model has for the asking only."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _held(config: PreTrainedConfig, reader: Reader | None) -> dict[str, int]:
    """Bytes of the weights by form, nothing for those in bits that kvbits does not run or whose files are not here."""
    if not _quantization(config):
        return held(blank(config), {}) if reader is None else reader.held()
    try:
        return {} if reader is None else reader.held()
    except UnsupportedError:
        return {}


def _quantization(config: PreTrainedConfig) -> Mapping[str, Any]:
    fields = config.to_dict()
    found = fields.get("quantization_config") or fields.get("compression_config")
    return found if isinstance(found, Mapping) else {}


def _published(quantization: Mapping[str, Any]) -> str:
    """The dtype of weights in bits, by a checkpoint's configuration alone."""
    method = str(quantization.get("quant_method", "")).lower()
    if method in ("fp8", "mxfp4"):
        return method
    groups = quantization.get("config_groups") or {"": {}}
    weights = next(iter(groups.values())).get("weights") or {}
    bits = quantization.get("bits") or quantization.get("w_bit") or weights.get("num_bits")
    eight = "fp8" if weights.get("type") == "float" else "w8a8"
    return "awq" if bits == 4 else eight if bits == 8 else "bf16"


def parameters_of(config: PreTrainedConfig) -> Parameters:
    """Count the parameters of a model of this configuration, each shared one once; no memory is taken for them."""
    model = blank(config)
    sizes = {id(p): (name, p.numel()) for name, p in model.named_parameters()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(end.weight): end.weight.numel() for end in ends if end is not None}
    experts = sum(size for name, size in sizes.values() if ".experts." in name and "bias" not in name)
    return Parameters(sum(size for _, size in sizes.values()), sum(embeddings.values()), experts)


def _config(name: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, str, Reader | None]:
    """The configuration that ``name`` stands for, where it was read, and what reads the weights beside it."""
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        beside = Source(str(path)) if path.is_dir() and any(path.glob("*.safetensors")) else None
        reader = Reader(name, beside, trust_remote_code) if beside is not None else None
        return _of_file(file, trust_remote_code), str(file), reader
    source = locate(name)
    reader = Reader(name, source, trust_remote_code)
    return reader.configuration(), source.path if source.gguf is None else f"{source.path}/{source.gguf}", reader


def _of_file(file: Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = fields.pop("model_type")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the model configuration '{file}': {error}") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"'{file}' is no Hugging Face config.json: it has no model_type") from error
    if kind not in CONFIG_MAPPING and "auto_map" in fields:
        return Reader(str(file.parent), Source(str(file.parent)), trust_remote_code).configuration()
    try:
        with quiet():
            # transformers writes an infinite time step as an object
            config: PreTrainedConfig = AutoConfig.for_model(kind, **PreTrainedConfig._decode_special_floats(fields))
            return config
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers cannot read the configuration '{file}': {reason}") from error
