"""The memory of the cache: one reservation, cut into frames; and what a kernel gets to see of it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbits.codecs import LayerRounding, Place, Policy, PoolLayout
from kvbits.codecs.states import StateLayout
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry, StateShape
from kvbits.errors import ConfigError
from kvbits.memory import check_host, show


@dataclass(frozen=True)
class LayerView:
    """One layer of the pool: all that a kernel ever gets.

    ``buffer`` is ``uint8 [num_frames, frame_bytes]``, one frame after another; ``sealed``, ``open`` and ``first_page``
    (a sequence's first page, where it has a dtype of its own) say where in a page's frames this layer lies and how it
    is coded; ``rounding`` how codes are chosen when a page other than that one is sealed.
    """

    index: int
    geometry: LayerGeometry
    buffer: Tensor
    sealed: Place
    open: Place
    first_page: Place | None = None
    rounding: LayerRounding | None = None


class PagedPool:
    """A fixed number of frames in one block of memory.

    The block is reserved once; the operating system commits a frame when it is first written. Which frame belongs to
    whom is :class:`kvbits.pages.PageManager`'s business, not the pool's.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        policy: Policy,
        memory_bytes: int,
        buffer: Tensor | None = None,
        device: torch.device | str = "cpu",
        free_windows: bool = True,
        states: StatePool | None = None,
    ) -> None:
        """Reserve ``memory_bytes`` of ``device`` (or use ``buffer``, ``uint8``, of at least that size).

        ``free_windows`` false: every page of every layer is kept, and a sealed page is one frame. ``states``: the
        memory of recurrent layers, beside it.
        Raises ``ConfigError`` when not even one short sequence fits, ``UnsupportedError`` when a layer does not fit
        its codec.
        """
        self.geometry = geometry
        self.policy = policy
        self.states = states
        self.layout = PoolLayout.of(geometry, policy, free_windows)
        self.num_frames = self.layout.frames_in(memory_bytes)
        least = self.layout.frames_of(PAGE_TOKENS)
        if self.num_frames < least:
            raise ConfigError(
                f"a KV cache of {memory_bytes} bytes holds {self.num_frames} frames of {self.layout.frame_bytes} bytes;"
                f" one session needs {least} ({self.layout.session_bytes(PAGE_TOKENS)} bytes)"
            )
        size = self.layout.bytes_of(self.num_frames)
        block = _reserve(size, torch.device(device)) if buffer is None else buffer[:size]
        self.buffer = block.view(self.num_frames, self.layout.frame_bytes)
        sealed, own, sink = self.layout.sealed, self.layout.open, self.layout.sink
        self.layers = tuple(
            LayerView(
                index=i,
                geometry=layer,
                buffer=self.buffer,
                sealed=sealed.places[i],
                open=own.places[i],
                first_page=sink.places[i] if sink else None,
                rounding=policy.rounding[i] if policy.rounding else None,
            )
            for i, layer in enumerate(geometry.layers)
        )

    @classmethod
    def smallest(
        cls, geometry: ModelGeometry, policy: Policy, device: torch.device | str = "cpu", sequences: int = 1
    ) -> PagedPool:
        """A pool of a page for each of ``sequences``: for what only asks a pool for its layers, or stores no more."""
        size = sequences * PoolLayout.of(geometry, policy, free_windows=False).session_bytes(PAGE_TOKENS)
        return cls(geometry, policy, size, device=device, free_windows=False)

    def copy(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        """Copy frame by frame (copy-on-write, or to make room)."""
        for a, b in zip(source, target, strict=True):
            self.buffer[b] = self.buffer[a]

    def sessions_capacity(self, tokens: int) -> int:
        """Running sequences of ``tokens`` tokens that the pool holds at once, open pages and states included."""
        found = self.layout.sessions(self.buffer.nbytes, tokens)
        return found if self.states is None else min(found, self.states.num_slots)

    def session_bytes(self, tokens: int) -> int:
        """Bytes that a running sequence of ``tokens`` tokens holds, its open page and its states included."""
        return self.layout.session_bytes(tokens) + (0 if self.states is None else self.states.slot_bytes)

    def bits_per_element(self) -> float:
        """Bits per element of a sealed page, every parameter counted."""
        return self.policy.bits_per_element(self.geometry)

    def effective_bits_per_element(self, tokens: int) -> float:
        """Bits per element over all frames that a sequence of ``tokens`` tokens holds, open page included."""
        return self.layout.effective_bits(tokens)

    def bytes_per_token(self) -> float:
        """Bytes of one token in a sealed page."""
        return self.layout.bytes_per_token


class StatePool:
    """``slots`` slots in one block of memory; which is whose is :class:`kvbits.pages.StateSlots`' business.

    ``dtype`` is what the model computes in. ``single``: layers run token by token, so that a token's result does not
    depend on how a prompt was cut. ``made``: what a model has made of a slot, by its number.
    """

    def __init__(
        self, geometry: ModelGeometry, slots: int, dtype: torch.dtype, device: torch.device | str, single: bool = False
    ) -> None:
        layout = StateLayout.of(geometry, dtype.itemsize)
        assert layout is not None, geometry.name
        self.geometry = geometry
        self.num_slots = slots
        self.dtype = dtype
        self.single = single
        self.slot_bytes = layout.slot_bytes
        self.made: dict[int, Any] = {}
        self._buffer = _reserve(slots * layout.slot_bytes, torch.device(device)).view(slots, layout.slot_bytes)
        self._starts = dict(zip(geometry.states, layout.offsets, strict=True))

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def state(self, slot: int, shape: StateShape) -> Tensor:
        """A state where it lies, ``[1, *shape]``."""
        start = self._starts[shape]
        part = self._buffer[slot, start : start + shape.nbytes(self.dtype.itemsize)]
        return part.view(self._stored(shape)).view(1, *shape.shape)

    def computed(self, shape: StateShape) -> torch.dtype:
        """What the layer of a state computes it in."""
        return torch.float32 if shape.wide else self.dtype

    def converts(self, layer: int) -> bool:
        """Whether a state of the model's layer ``layer`` is stored in another dtype than it is computed in."""
        return any(self._stored(shape) != self.computed(shape) for shape in self.of_layer(layer))

    @property
    def stored(self) -> str:
        """For users to read: the dtype of recurrent states, where it is not what layers compute them in."""
        found = {self._stored(s) for s in self.geometry.states if self._stored(s) != self.computed(s)}
        return "".join(f" (in {str(dtype).removeprefix('torch.')})" for dtype in found)

    def _stored(self, shape: StateShape) -> torch.dtype:
        if shape.stored in (None, self.computed(shape).itemsize):
            return self.computed(shape)
        return torch.float32 if shape.stored == 4 else torch.bfloat16

    def raw(self, slot: int) -> Tensor:
        """All states of a slot as bytes, where they lie: ``uint8 [slot_bytes]``."""
        return self._buffer[slot]

    def copy(self, source: int, target: int) -> None:
        """Copy all states of a slot."""
        self._buffer[target].copy_(self._buffer[source])

    def copy_layer(self, layer: int, source: int, target: int) -> None:
        """Copy the states of the model's layer ``layer``."""
        for shape in self.of_layer(layer):
            self.state(target, shape).copy_(self.state(source, shape))

    def of_layer(self, layer: int) -> list[StateShape]:
        """The states of the model's layer ``layer``."""
        return [shape for shape in self.geometry.states if shape.layer == layer]


def _reserve(size: int, device: torch.device) -> Tensor:
    """Memory ``uint8 [size]`` of a device; the host's is anonymous, in huge pages where the system has them.

    Attention walks the pool in pieces of a few kilobytes; with 4 KiB pages the address translation costs as much as the
    reading.
    """
    if device.type != "cpu":
        return _reserve_on(size, device)
    check_host({"kv_cache_memory": size})
    try:
        # private: shared memory gets no huge pages
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"the system refuses a KV cache of {show(size)}: {error}; give less") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def _reserve_on(size: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        free, total = torch.get_device_module(device).mem_get_info(device)
        raise ConfigError(
            f"there is no memory on {device} for kv_cache_memory of {show(size)}: {show(free)} of {show(total)} are "
            "free; give less"
        ) from error
