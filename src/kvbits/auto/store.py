"""Measured losses in the user's cache directory: a directory for each model, a file for each measurement.

A file is JSON: ``format``, ``version``, ``kvbits``, ``pages`` (the versions of program and page bytes), ``model`` (a
name for people), ``conditions`` (plain types: what else decides the result, and the file's name) and ``losses``. Two
processes that measure at once write the same file twice, each whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kvbits
from kvbits import user_cache
from kvbits.auto.loss import Loss
from kvbits.engine.transfer import VERSION as PAGES

FORMAT, VERSION = "kvbits-losses", 1
"""The version rises when a measurement of the same conditions would give another result."""


class Damaged(Exception):
    """A file that is there and cannot be used; the message says why."""


def load(fingerprint: str, conditions: Mapping[str, Any], dtypes: Collection[str]) -> list[Loss] | None:
    """What was measured on the model under ``conditions``; ``None`` where nothing was.

    Raises :class:`Damaged`, also where one of ``dtypes`` is missing.
    """
    try:
        file = _file(fingerprint, conditions)
        if not file.exists():
            return None
        losses = _read(file)
    except OSError as error:
        raise Damaged(str(error)) from error
    if {loss.dtype for loss in losses} != set(dtypes):
        raise Damaged(f"'{file}' is damaged")
    return losses


def find(fingerprint: str, dtype: str) -> Loss | None:
    """The loss of ``dtype`` that was measured on the most tokens, by this version; files that are damaged are not."""
    found = [loss for losses in _all(fingerprint) for loss in losses if loss.dtype == dtype]
    return max(found, key=lambda loss: loss.tokens, default=None)


def save(fingerprint: str, model: str, conditions: Mapping[str, Any], losses: Sequence[Loss]) -> None:
    """Keep ``losses``, in the place of earlier ones under the same conditions. Raises ``OSError``."""
    document = {
        **_HEAD,
        "model": model,
        "conditions": dict(conditions),
        "losses": [loss.as_json() for loss in losses],
    }
    user_cache.write(_file(fingerprint, conditions), json.dumps(document, indent=1) + "\n")


_HEAD = {"format": FORMAT, "version": VERSION, "kvbits": kvbits.__version__, "pages": PAGES}


def directory(fingerprint: str) -> Path:
    """Where the files of a model lie. Raises ``OSError`` where there is no home."""
    return user_cache.folder("losses") / fingerprint


def _file(fingerprint: str, conditions: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(dict(conditions), sort_keys=True).encode()).hexdigest()
    return directory(fingerprint) / f"{digest[:16]}.json"


def _read(file: Path) -> list[Loss]:
    """Raises :class:`Damaged` or ``OSError``."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        head = {name: document[name] for name in _HEAD}
        losses = [Loss.from_json(fields) for fields in document["losses"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"'{file}' is damaged") from error
    if head != _HEAD:
        raise Damaged(f"'{file}' was written by kvbits {head['kvbits']}, this is {kvbits.__version__}")
    return losses


def _all(fingerprint: str) -> Iterator[list[Loss]]:
    try:
        files = sorted(directory(fingerprint).glob("*.json"))
    except OSError:
        return
    for file in files:
        try:
            yield _read(file)
        except (Damaged, OSError):
            continue
