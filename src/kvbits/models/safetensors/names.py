"""Which parameter of transformers' model a tensor of a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key


def placed(model: Any, names: Iterable[str]) -> dict[str, str] | None:
    """A tensor's name in the model's state for each of ``names``, by transformers' own table of renamings.

    ``None`` where one of them is a part of a parameter only (the experts of a mixture), which transformers puts
    together.
    """
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is not None and renamed in state:
            return None
        found[name] = renamed
    return found
