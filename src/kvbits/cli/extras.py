"""Which extra brings a library that is not there."""

from __future__ import annotations

import importlib.util

from kvbits.errors import ConfigError

_EXTRAS = {
    "server": ("fastapi", "uvicorn", "pydantic", "prometheus_client", "httptools", "uvloop", "starlette"),
    "client": ("httpx", "aiohttp"),
    "plot": ("matplotlib",),
    "report": ("plotly",),
    "lm-eval": ("lm_eval",),
    "ray": ("ray",),
    "vllm": ("vllm",),
    "lmcache": ("lmcache",),
    "gpu": ("triton",),
}


def require(extra: str) -> None:
    """Raise ``ConfigError`` unless the libraries of ``extra`` are there; for work that needs them only at its end."""
    for library in _EXTRAS[extra]:
        if importlib.util.find_spec(library) is None:
            raise ConfigError(_line(library, extra))


def missing(error: ModuleNotFoundError) -> str | None:
    """What to install for the library that ``error`` names; ``None`` for a library that no extra has."""
    library = (error.name or "").partition(".")[0]
    for extra, libraries in _EXTRAS.items():
        if library in libraries:
            return _line(library, extra)
    return None


def _line(library: str, extra: str) -> str:
    return f"this needs {library}, which is not installed: pip install 'kvbits[{extra}]'"
