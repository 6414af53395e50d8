"""The facts that a plan needs of a model, whatever names it: a table, a configuration file, or a model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.geometry import geometry_of
from kvbits.models.locate import Source, locate
from kvbits.models.quiet import quiet
from kvbits.models.reader import Reader
from kvbits.models.trust import trusted
from kvbits.planning.facts import ModelFacts, Parameters, facts_of_config, known_facts
from kvbits.planning.hf_config import MLA, text_config

_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def facts_of_model(name: str, mla: MLA = "latent", trust_remote_code: bool = False) -> ModelFacts:
    """Facts of ``name``: one of the tables' models, a ``config.json`` or a directory with one, a model that loads.

    No weights are read. A configuration's geometry is measured on a copy without memory, as the engine does; only the
    latent of multi-head latent attention follows from its fields. Raises ``ConfigError`` when there is no such model,
    ``UnsupportedError`` when kvbits could not cache it.
    """
    known = known_facts(name, mla)
    if known is not None:
        return known
    config, source = _config(name, trust_remote_code)
    parameters = parameters_of(config)
    fields = config.to_dict()
    latent = mla == "latent" and "kv_lora_rank" in text_config(fields)
    return facts_of_config(
        name,
        source,
        fields,
        parameters.total,
        parameters.embeddings,
        parameters.experts,
        weights="bf16",
        mla=mla,
        geometry=None if latent else geometry_of(config, name),
    )


def parameters_of(config: PreTrainedConfig) -> Parameters:
    """Count the parameters of a model of this configuration, each shared one once; no memory is taken for them."""
    try:
        with quiet(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted(config))
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(
            f"no causal language model can be made of this {config.model_type} model: {reason}"
        ) from error
    sizes = {id(p): (name, p.numel()) for name, p in model.named_parameters()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(end.weight): end.weight.numel() for end in ends if end is not None}
    experts = sum(size for name, size in sizes.values() if ".experts." in name and "bias" not in name)
    return Parameters(sum(size for _, size in sizes.values()), sum(embeddings.values()), experts)


def _config(name: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, str]:
    """The configuration that ``name`` stands for, and where it was read."""
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        return _of_file(file, trust_remote_code), str(file)
    source = locate(name)
    return Reader(name, source, trust_remote_code).configuration(), source.path


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
            config: PreTrainedConfig = AutoConfig.for_model(kind, **fields)
            return config
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers cannot read the configuration '{file}': {reason}") from error
