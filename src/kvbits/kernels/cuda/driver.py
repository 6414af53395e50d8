"""NVIDIA's driver: compiled kernels are loaded and launched on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from kvbits.errors import UnsupportedError
from kvbits.kernels.cuda.attend import Step
from kvbits.kernels.cuda.nvrtc import architectures, compiled, version
from kvbits.kernels.cuda.variant import WARPS, Variant
from kvbits.kernels.device import on_device

LEAST = (8, 0)
"""Compute capability (Ampere): asynchronous copies and products of 16 x 8 x 16 begin with it."""


def refusal(device: torch.device) -> str | None:
    """``None``, or the reason why the kernels cannot run on ``device``."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return "they need a GPU of NVIDIA's that torch can use"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        name = torch.cuda.get_device_name(device)
        return f"they need compute capability {LEAST[0]}.{LEAST[1]}; {name} has {capability[0]}.{capability[1]}"
    try:
        _driver()
        known = architectures()
    except UnsupportedError as error:
        return str(error)
    arch = f"sm_{capability[0]}{capability[1]}"
    return None if arch in known else f"NVIDIA's run-time compiler {version()} does not know {arch}"


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"NVIDIA's driver cannot be loaded: {error}") from error


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{what}: {(name.value or b'unknown').decode()} ({result})")


class Driver:
    """Launches kernels on one device; compiles each variant when it first runs."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)
        properties = torch.cuda.get_device_properties(self._device)
        self.multiprocessors = int(properties.multi_processor_count)
        self.arch = f"sm_{properties.major}{properties.minor}"
        self._functions: dict[Variant, ctypes.c_void_p] = {}

    def __call__(self, variant: Variant, grid: tuple[int, int], step: Step) -> None:
        if variant not in self._functions:
            self.prepare(variant)
        with on_device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(step))
            size = variant.shared_bytes
            _check(
                _driver().cuLaunchKernel(
                    self._functions[variant], *grid, 1, 32 * WARPS, 1, 1, size, stream, arguments, None
                ),
                f"launching {variant}",
            )

    def prepare(self, variant: Variant) -> None:
        """Compile and load ``variant``."""
        if variant not in self._functions:
            with on_device(self._device):
                self._functions[variant] = self._load(variant)

    def _load(self, variant: Variant) -> ctypes.c_void_p:
        torch.cuda.current_stream(self._device).synchronize()  # makes torch's context the thread's
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        code = compiled(self.arch, variant.defines)
        try:
            _check(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {variant}")
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, b"decode"), f"loading {variant}")
        except RuntimeError as error:  # a driver that is older than the compiler
            raise UnsupportedError(f"{error}; choose the backend 'triton', which does without") from error
        return function
