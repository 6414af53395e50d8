"""NVIDIA's run-time compiler, which torch's CUDA builds bring: source to machine code, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from kvbits import user_cache
from kvbits.errors import UnsupportedError
from kvbits.kernels.cuda import SOURCES

HEADERS = ("warp.cuh", "codes.cuh", "page.cuh")
NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")


def _candidates() -> list[str]:
    """The release of torch's own CUDA first: a driver may be too old for what a later compiler makes."""
    found, own = [], (torch.version.cuda or "").partition(".")[0]
    for name in sorted(NAMES, key=lambda name: not name.endswith(f".so.{own}")):
        for folder in sys.path:
            found += [str(path) for path in sorted(Path(folder or ".").glob(f"nvidia/*/lib/{name}"))]
        found.append(name)  # the system's
    return found


@cache
def library() -> ctypes.CDLL:
    """The compiler; raises ``UnsupportedError`` where there is none."""
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnsupportedError(
        f"NVIDIA's run-time compiler ({' or '.join(NAMES)}) was not found; torch's CUDA builds bring it"
    )


@cache
def version() -> str:
    """Of the compiler, such as ``"12.9"``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@cache
def architectures() -> tuple[str, ...]:
    """What the compiler makes machine code for, such as ``"sm_90"``."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(found))
    return tuple(f"sm_{number}" for number in found)


def _check(result: int, program: ctypes.c_void_p | None = None) -> None:
    if result == 0:
        return
    nvrtc = library()
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    message = nvrtc.nvrtcGetErrorString(result).decode()
    if program is not None:
        message += "\n" + _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(
            errors="replace"
        )
    raise UnsupportedError(f"the CUDA kernels did not compile: {message}")


def _text(program: ctypes.c_void_p, size_of: object, get: object) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))  # type: ignore[operator]
    text = ctypes.create_string_buffer(size.value)
    get(program, text)  # type: ignore[operator]
    return text.raw


def compile_source(arch: str, defines: Sequence[str]) -> bytes:
    """Machine code of ``decode.cu`` for ``arch`` such as ``"sm_90"``; ``defines`` such as ``"KEYS=4"``.

    Raises ``UnsupportedError`` with the compiler's words when that fails.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    texts = [(SOURCES / name).read_bytes() for name in HEADERS]
    headers = (ctypes.c_char_p * len(texts))(*texts)
    names = (ctypes.c_char_p * len(texts))(*(name.encode() for name in HEADERS))
    source = (SOURCES / "decode.cu").read_bytes()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"decode.cu", len(texts), headers, names))
    try:
        options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{define}" for define in defines)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        _check(nvrtc.nvrtcCompileProgram(program, len(options), encoded), program)
        return _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def compiled(arch: str, defines: Sequence[str], folder: Path | None = None) -> bytes:
    """As :func:`compile_source`, kept in ``folder`` (the user's cache) by what it depends on."""
    sources = b"".join((SOURCES / name).read_bytes() for name in (*HEADERS, "decode.cu"))
    key = hashlib.sha256(sources + "\n".join([version(), arch, *defines]).encode()).hexdigest()[:32]
    try:
        path = (folder or user_cache.folder("cuda")) / f"{key}.cubin"
        return path.read_bytes()
    except OSError:
        code = compile_source(arch, defines)
    with suppress(OSError):  # a cache that cannot be written costs seconds at every start
        user_cache.write((folder or user_cache.folder("cuda")) / f"{key}.cubin", code)
    return code
