"""What commands do before their own work: threads, the model, prompts and texts. Imports torch when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbits.engine.bar import Bar
from kvbits.errors import ConfigError

__all__ = ["Bar", "load", "machine", "note", "prompts_of", "tokens_of"]

if TYPE_CHECKING:
    from kvbits.models import LoadedModel
    from kvbits.models.load import Check


def load(
    model: str,
    dtype: str,
    threads: int | None,
    weights: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    *,
    max_model_len: int | None = None,
    disable_mla: bool = False,
    check: Check | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Set the number of threads and load the model, naming each long stage to ``progress`` (default: on stderr).

    Commands check first what can be checked without it (:mod:`kvbits.engine.precheck`), and with ``check`` what only
    the layers' geometry tells.
    """
    from kvbits.models.formats import on_cpu
    from kvbits.models.lean import lean

    with lean() if on_cpu(device) and not trust_remote_code else nullcontext():
        import torch

        from kvbits.models import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        return load_model(
            model,
            dtype=dtype,
            progress=progress or note,
            weights=weights,
            device=device,
            trust_remote_code=trust_remote_code,
            max_model_len=max_model_len,
            disable_mla=disable_mla,
            check=check,
        )


def note(line: str) -> None:
    """A line on stderr, so that stdout holds nothing but results."""
    print(line, file=sys.stderr, flush=True)


def prompts_of(prompts: list[str], files: list[Path]) -> list[str]:
    """Prompts from the command line and from files, in this order. Raises ``ConfigError`` when there is none."""
    from kvbits.evaluation.windows import read_text

    found = [*prompts, *(read_text(path) for path in files)]
    if not found:
        raise ConfigError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    if not all(found):
        raise ConfigError("a prompt is empty; --prompt needs at least one character")
    return found


def tokens_of(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a long text, without special tokens."""
    return list(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts that a measured number needs beside it: device, kernels' instruction set, threads."""
    import torch

    from kvbits.kernels import default_backend

    isa = getattr(default_backend(), "isa", None) if device == "cpu" else None
    return {"threads": torch.get_num_threads(), "device": device, "isa": isa}
