"""Files of families that transformers reads: what its reader would leave out."""

from __future__ import annotations

import numpy as np
from transformers import integrations

from kvbits.errors import UnsupportedError
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.keys import SAYS_NOTHING
from kvbits.models.gguf.rope import TENSORS

_MISREAD = ("gpt-oss.rope.scaling.type",)
"""Keys in whose place transformers' reader takes the length of their name."""


def refuse_dropped(file: GgufFile) -> None:
    """Raises ``UnsupportedError`` naming a key or a tensor of ``file`` that transformers' reader does not take."""
    name = file.architecture
    if file.parts > 1:
        raise UnsupportedError(
            f"'{file.path.name}' is one of {file.parts} files, and transformers reads one {name} file"
        )
    known = getattr(integrations, "GGUF_CONFIG_MAPPING", {})
    taken = known.get(name) or known.get(name.replace("-", "_")) or known.get(name.replace("moe", "_moe"))
    if taken is None:  # transformers' newer readers, or a family that it refuses itself
        return
    for key, value in file.metadata.items():
        own = key.removeprefix(f"{name}.")
        if own == key or (own in taken and key not in _MISREAD) or own in SAYS_NOTHING:
            continue
        if not np.any(value) if isinstance(value, np.ndarray) else not value:
            continue
        raise UnsupportedError(
            f"'{file.path.name}' says {key} = {value!r}, which transformers' reader of {name} files leaves out; kvbits "
            "would run another model than the file's"
        )
    left = TENSORS & file.tensors.keys()
    if left:
        raise UnsupportedError(
            f"'{file.path.name}' has the tensor {min(left)}, which transformers' reader of {name} files leaves out"
        )
