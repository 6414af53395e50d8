"""Tensors that lie in memory maps of their files: nothing is read before it is used."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from kvbits.models.safetensors.file import Stored

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class Maps:
    """Private maps of files, one each: who writes into a tensor does not change the file."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._places: list[tuple[int, int, mmap.mmap]] = []

    def tensor(self, stored: Stored) -> Tensor:
        """The tensor in its map. ``KeyError`` for a type that torch has not."""
        dtype = _DTYPES[stored.dtype]
        if not stored.size:
            return torch.empty(stored.shape, dtype=dtype)
        data = self._map(stored.path)
        if stored.start % dtype.itemsize:
            flat = torch.frombuffer(bytearray(data[stored.start : stored.start + stored.size]), dtype=dtype)
        else:
            flat = torch.frombuffer(data, dtype=dtype, count=stored.size // dtype.itemsize, offset=stored.start)
        return flat.view(stored.shape)

    def release(self, tensor: Tensor) -> None:
        """Tell the system that the pages of a contiguous ``tensor`` that was only read need not stay in memory; they
        are read again when needed. Nothing is done for one that lies in no map."""
        first = tensor.data_ptr()
        last = first + tensor.numel() * tensor.element_size()
        for begin, end, data in self._places:
            if begin <= first < end and hasattr(mmap, "MADV_DONTNEED"):
                at, behind = -(-(first - begin) // mmap.PAGESIZE), (last - begin) // mmap.PAGESIZE
                if behind > at:
                    data.madvise(mmap.MADV_DONTNEED, at * mmap.PAGESIZE, (behind - at) * mmap.PAGESIZE)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[path] = data
            begin = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
            self._places.append((begin, begin + len(data), data))
        return self._maps[path]
