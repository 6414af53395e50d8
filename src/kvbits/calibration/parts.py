"""Finished parts of a calibration, kept in files, so that one that was interrupted goes on where it stopped.

A directory of safetensors files, one a part, each written under another name first: what is there is whole.
``run.json`` says what the parts were computed from.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbits.errors import ConfigError
from kvbits.files import write_text

_RUN, _SUFFIX, _FACTS = "run.json", ".safetensors", "facts"


@dataclass(frozen=True)
class Part:
    """Plain types (``facts``) and tensors that are read one at a time."""

    facts: Any
    tensors: Mapping[str, Tensor] | Path

    def tensor(self, name: str) -> Tensor:
        """One of the part's tensors, as it was put."""
        if not isinstance(self.tensors, Path):
            return self.tensors[name]
        with safe_open(self.tensors, "pt") as file:
            found: Tensor = file.get_tensor(name)
            return found.clone()  # else the file's pages stay mapped

    def names(self) -> list[str]:
        """Names of the part's tensors."""
        if not isinstance(self.tensors, Path):
            return list(self.tensors)
        with safe_open(self.tensors, "pt") as file:
            return list(file.keys())


class Parts:
    """Parts by name; without a directory they live as long as the object."""

    def __init__(self, directory: Path | None = None, run: Mapping[str, Any] | None = None) -> None:
        """Begin in ``directory``, or go on with what is there; ``run`` (plain types) is all that parts depend on.

        Raises ``ConfigError`` when it cannot be read or written, or has parts of a run that differs in anything.
        """
        self.directory = directory
        self._held: dict[str, Part] = {}
        if directory is None:
            return
        text = json.dumps(dict(run or {}), indent=1, sort_keys=True)
        path = directory / _RUN
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _refuse_other(directory, path.read_text(encoding="utf-8"), text)
            elif any(not path.name.startswith(".") for path in directory.iterdir()):
                raise ConfigError(f"'{directory}' is not empty and no unfinished calibration; give another output")
            else:
                write_text(path, text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot keep finished parts in '{directory}': {error}") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others out of the directory. Raises ``ConfigError`` where one of them does."""
        assert self.directory is not None
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another calibration is at work in '{self.directory}'; wait for it, or give another output"
                ) from None
            yield
        finally:
            os.close(handle)

    def __len__(self) -> int:
        return len(self._held if self.directory is None else list(self.directory.glob(f"*{_SUFFIX}")))

    def get(self, name: str) -> Part | None:
        """A finished part, or ``None``; a file that is damaged is none."""
        if self.directory is None:
            return self._held.get(name)
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                return Part(json.loads(file.metadata()[_FACTS]), path)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor], facts: Any = None) -> Part:
        """Keep a part. Raises ``ConfigError`` where the disk does not take it."""
        if self.directory is None:
            self._held[name] = Part(facts, dict(tensors))
            return self._held[name]
        path = self._path(name)
        young = path.with_suffix(".part")
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, young, {_FACTS: json.dumps(facts)})
            young.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                young.unlink(missing_ok=True)
            raise ConfigError(f"cannot keep a finished part in '{path}': {error}") from error
        return Part(facts, path)

    def remove(self) -> None:
        """Forget everything, the directory included."""
        self._held.clear()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}{_SUFFIX}"


def _refuse_other(directory: Path, found: str, wanted: str) -> None:
    try:
        old, new = json.loads(found), json.loads(wanted)
        differ = [f"{name} {old.get(name)!r} and not {new.get(name)!r}" for name in new if old.get(name) != new[name]]
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"'{directory / _RUN}' is damaged: {error}; delete '{directory}' to begin anew") from error
    if differ or set(old) - set(new):
        raise ConfigError(
            f"'{directory}' holds parts of another calibration ({', '.join(differ) or 'other settings'}); repeat its "
            "command to end it, delete the directory, or give another output"
        )
