"""Sealed pages as bytes: computed on one machine, used on another.

A bundle holds the full pages that a text begins with, exactly as they lie in the pool, and what decides whether they
may be used: model, policy, layout and a checksum. As a file it is safetensors (``docs/offload.md`` lists its fields).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.engine.engine import Engine
from kvbits.errors import CacheError, ConfigError
from kvbits.files import write_bytes
from kvbits.pages.groups import part_key

FORMAT, VERSION = "kvbits-pages", "2"
"""The version rises when bytes of a dtype change their meaning; 2: keys of ``int8`` have parameters per channel."""

_WHAT = "a bundle of pages"

_SEQUENCE = -1
"""The id of the sequence that holds the pages while they are copied; the engine's own count from 0."""


@dataclass(frozen=True)
class PageBundle:
    """The pages of ``tokens`` (``int64 [pages * 64]``): ``frames`` is ``uint8 [frames, frame_bytes]``, page after page.

    Of layers with a sliding window they are those that the token after all of them sees.
    ``identity`` says what they belong to.
    """

    tokens: Tensor
    frames: Tensor
    identity: dict[str, str]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages alone."""
        return self.frames.nbytes

    def to_bytes(self) -> bytes:
        """The bundle as a safetensors file."""
        tensors = {"tokens": self.tokens, "frames": self.frames}
        metadata = {"format": FORMAT, "version": VERSION, **self.identity, "sha256": _checksum(tensors)}
        return save_tensors(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "the bundle") -> PageBundle:
        """Read what :meth:`to_bytes` wrote; ``what`` names it in errors. Raises ``ConfigError`` when it is damaged."""
        try:
            tensors = load_tensors(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except (SafetensorError, ValueError) as error:
            raise ConfigError(f"{what} is damaged or no safetensors file: {' '.join(str(error).split())}") from error
        metadata = header.get("__metadata__", {})
        found = metadata.pop("format", None), metadata.pop("version", None)
        if found[0] == FORMAT and found[1] != VERSION:
            raise ConfigError(
                f"{what} holds pages of version {found[1]}; this version reads {VERSION}: save them again"
            )
        if found[0] != FORMAT or set(tensors) != {"tokens", "frames"}:
            raise ConfigError(f"{what} is no file of pages that this version reads ({FORMAT} {VERSION})")
        if (tensors["tokens"].dtype, tensors["frames"].dtype) != (torch.int64, torch.uint8):
            raise ConfigError(f"{what} is damaged: its tensors have other types")
        if metadata.pop("sha256", None) != _checksum(tensors):
            raise ConfigError(f"{what} is damaged: its checksum is another one")
        return cls(tensors["tokens"], tensors["frames"], metadata)

    def save(self, path: Path) -> None:
        """Write the file. Raises ``ConfigError`` when that fails."""
        write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> PageBundle:
        """Read the file. Raises ``ConfigError`` when it is missing or damaged."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read '{path}': {error.strerror or error}") from error
        return cls.from_bytes(data, f"'{path}'")


def export_pages(engine: Engine, tokens: Sequence[int], salt: str = "") -> PageBundle:
    """The full pages of ``tokens`` that ``engine`` has in its prefix cache, or in its offload tier.

    Raises ``UnsupportedError`` for a model with recurrent layers, as :func:`import_pages` does.
    """
    pages, pool = engine.pages, engine.pool
    pool.geometry.refuse_states(_WHAT)
    # One token more than there are: a lookup always leaves one to compute.
    known = [*tokens, 0]
    pages.open(_SEQUENCE, known, salt.encode())
    try:
        pages.restore(_SEQUENCE, known)
        stored = pages.stored(_SEQUENCE)
        index = torch.tensor([f for f in (*stored.sink, *stored.sealed) if f >= 0], dtype=torch.long)
        frames = pool.buffer[index.to(pool.buffer.device)].cpu()
        found = torch.tensor(pages.tokens(_SEQUENCE), dtype=torch.int64)
    finally:
        pages.free(_SEQUENCE)
    return PageBundle(found, frames, _identity(engine))


def import_pages(engine: Engine, bundle: PageBundle, salt: str = "", what: str = "the bundle") -> int:
    """Put the pages of ``bundle`` into the prefix cache of ``engine``, between two steps; returns their tokens.

    That is fewer than the bundle's where the pool has no room beside running requests. Raises ``ConfigError`` when the
    pages belong to another model or policy, ``CacheError`` when the prefix cache is off.
    """
    engine.pool.geometry.refuse_states(_WHAT)
    if not engine.pages.enable_prefix_caching:
        raise CacheError("pages can only be loaded into a prefix cache, and enable_prefix_caching is off")
    _check(engine, bundle, what)
    tokens = [*bundle.tokens.tolist(), 0]
    engine.pages.open(_SEQUENCE, tokens, salt.encode())
    try:
        source = _BundleSource(engine, bundle, engine.pages.hashes(tokens, salt.encode()))
        return engine.pages.restore(_SEQUENCE, tokens, source)
    finally:
        engine.pages.free(_SEQUENCE)


def load_pages(engine: Engine, path: Path, salt: str = "") -> int:
    """Put the pages of the file ``path`` into the prefix cache of ``engine``; returns their tokens.

    Raises ``ConfigError`` when the file is damaged or belongs to another model or KV cache dtype, ``CacheError`` when
    the pool has no room for all of it.
    """
    bundle = PageBundle.load(path)
    loaded = import_pages(engine, bundle, salt, f"'{path}'")
    if loaded < bundle.num_tokens:
        raise CacheError(f"the KV cache has room for {loaded} of the {bundle.num_tokens} tokens in '{path}'")
    return loaded


class _BundleSource:
    """A bundle as a source of pages."""

    def __init__(self, engine: Engine, bundle: PageBundle, hashes: Sequence[bytes]) -> None:
        self._buffer = engine.pool.buffer
        self._frames = bundle.frames
        self._start: dict[bytes, int] = {}
        shape, start = engine.pages.shape, 0
        for page, group in shape.kept_parts(len(hashes)):
            self._start[part_key(hashes[page], group)] = start
            start += shape.size(page, group)

    def holds(self, key: bytes) -> bool:
        return key in self._start

    def fetch(self, key: bytes, frames: tuple[int, ...]) -> bool:
        for row, frame in enumerate(frames, self._start[key]):
            self._buffer[frame].copy_(self._frames[row])
        return True


def _check(engine: Engine, bundle: PageBundle, what: str) -> None:
    own, theirs = _identity(engine), bundle.identity
    for name, label in _LABELS.items():
        if theirs.get(name) != own[name]:
            raise ConfigError(f"{what} holds pages of {label} '{theirs.get(name)}'; this engine's is '{own[name]}'")
    layout, count = engine.pool.layout, engine.pages.shape.held(bundle.num_tokens // PAGE_TOKENS)
    if bundle.num_tokens % PAGE_TOKENS or tuple(bundle.frames.shape) != (count, layout.frame_bytes):
        raise ConfigError(
            f"{what} holds {bundle.num_tokens} tokens in {list(bundle.frames.shape)} bytes; expected "
            f"{[count, layout.frame_bytes]}"
        )


_LABELS = {"fingerprint": "the model with the hash", "policy": "the KV cache dtype", "layout": "the page layout"}


def _identity(engine: Engine) -> dict[str, str]:
    """What decides the bytes of a page besides its tokens."""
    layout = engine.pool.layout
    places = [
        [(p.scheme.name, p.frame, p.offset) for p in page.places] for page in (layout.sealed, layout.sink) if page
    ]
    kept = [group.kept for group in layout.groups]
    windows = [kept] if any(pages is not None for pages in kept) else []
    text = json.dumps([PAGE_TOKENS, layout.frame_bytes, layout.sealed.frames, places, *windows])
    return {
        "model": engine.loaded.name,
        "fingerprint": engine.loaded.fingerprint,
        "policy": engine.pool.policy.name,
        "layout": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("tokens", "frames"):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()
