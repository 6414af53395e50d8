"""Packages whose names are imported when they are first used, so that what needs no torch starts without it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` (PEP 562) for ``package``: the names of ``homes`` come from the modules that they stand beside.

    It raises ``AttributeError`` with the choices for any other name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'; it has {', '.join(sorted(homes))}")
        value = getattr(import_module(homes[name]), name)
        # From now on it is found without this function, also where a module of the package has the same name.
        setattr(sys.modules[package], name, value)
        return value

    return get
