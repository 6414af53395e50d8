"""What a plan must know of a model in a GGUF file, from its header: neither torch nor transformers is imported."""

from __future__ import annotations

import math
from pathlib import Path

from kvbits.models.gguf.fields import family_of, fields_of
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.rope import TENSORS
from kvbits.models.locate import locate
from kvbits.planning.facts import ModelFacts, facts_of_config
from kvbits.planning.hf_config import MLA

_ENDS = ("token_embd.weight", "output.weight")


def facts_of_gguf(name: str, mla: MLA) -> ModelFacts | None:
    """Facts of the model ``name``; ``None`` where it is in no GGUF file of a family that kvbits reads itself.

    Raises ``ConfigError`` when there is no such model.
    """
    source = locate(name)
    if source.gguf is None:
        return None
    file = GgufFile(Path(source.path) / source.gguf)
    if family_of(file) is None:
        return None
    sizes = {n: math.prod(t.shape) for n, t in file.tensors.items() if n not in TENSORS}
    experts = sum(size for n, size in sizes.items() if n.endswith("_exps.weight"))
    embeddings = sum(sizes.get(n, 0) for n in _ENDS)
    # As kvbits loads it: the weights of such files become 16-bit ones.
    fields = fields_of(file)
    return facts_of_config(name, str(file.path), fields, sum(sizes.values()), embeddings, experts, "bf16", mla)
