"""Import transformers' models without what only training and compiling need, a second of a start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import utils

_COMPILER = "torch._dynamo"


@contextmanager
def lean() -> Iterator[None]:
    """For a process that runs models on the CPU and does nothing else, around the import of the loader and loading.

    ``transformers.modeling_utils`` would load scipy for losses, torch's distributed tensors for sharding and its
    compiler for one class and some marks, and so would building a model without memory. Afterwards all three can be
    imported as ever; modules of transformers that came meanwhile do without. Where it does not work with the versions
    that are installed, or they are there already, nothing is changed.
    """
    with ExitStack() as stack:
        if _COMPILER not in sys.modules and "transformers.modeling_utils" not in sys.modules:
            stack.enter_context(_said(utils, "is_scipy_available", lambda: False))
            stack.enter_context(_said(torch.distributed, "is_available", lambda: False))
            stack.enter_context(_said(torch.compiler, "disable", _unmarked))
            stack.enter_context(_package_alone(_COMPILER))
            try:
                import transformers.masking_utils
                import transformers.modeling_utils  # noqa: F401
            except (ImportError, AttributeError):
                stack.close()
        yield


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """In the place of a decorator, with or without arguments."""
    return _unmarked if function is None else function


def _decorator(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _unmarked


@contextmanager
def _said(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _package_alone(name: str) -> Iterator[None]:
    """Modules of a package of torch's can be imported; the package itself has decorators that do nothing."""
    parent, _, leaf = name.rpartition(".")
    empty: Any = ModuleType(name)
    empty.__getattr__ = _decorator
    empty.__path__ = [str(Path(sys.modules[parent].__path__[0]) / leaf)]
    sys.modules[name] = empty
    try:
        yield
    finally:
        if sys.modules.get(name) is empty:
            del sys.modules[name]
        vars(sys.modules[parent]).pop(leaf, None)
