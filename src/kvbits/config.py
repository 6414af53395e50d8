"""Plain facts that every layer of kvbits shares: page size, model geometry, the scheduler's constants. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from decimal import Decimal
from math import prod

from kvbits.errors import ConfigError, UnsupportedError

PAGE_TOKENS = 64
"""Tokens in one page. Every codec, kernel and table counts in pages of this size."""

ALIGNMENT = 64
"""Bytes; every block inside a page starts on a cache line."""

POLICY_PREFIX = "policy:"
"""What a KV cache dtype begins with when it names the directory of a calibrated policy."""

MODEL_DTYPES = ("bfloat16", "float32")
"""What a model's layers compute in."""

STATE_DTYPES = ("auto", "float32", "bfloat16")
"""What recurrent states are stored in; ``auto``: as the model computes them."""

WEIGHT_FORMATS = ("auto", "bf16", "int8", "int4")
"""What the weights of linear layers and embeddings are stored as; ``auto``: as the model's files have them."""
AUTO = "auto"
"""The KV cache dtype that stands for one that is chosen by measuring (:mod:`kvbits.auto`)."""


def is_auto(dtype: object) -> bool:
    """Whether a KV cache dtype is :data:`AUTO`, in whatever case it was written."""
    return isinstance(dtype, str) and dtype.strip().lower() == AUTO


WATERMARK = 100
"""One frame in so many stays free at admission, so that a newcomer does not push out running sequences at once."""

MIN_PREFILL = 64
"""Tokens of a step that go to prompts even where the running sequences use up the budget."""

OVERTAKEN = 4
"""A prompt goes before one that has at least so many times its tokens left."""


@dataclass(frozen=True)
class LayerGeometry:
    """What the attention of one layer looks like.

    ``scale`` multiplies ``q . k`` before the softmax; ``window`` is the number of tokens a query sees, itself
    included (``None``: all), or where ``chunked`` the size of the chunks that texts are cut into, from position 0 on: a
    query sees its own chunk up to itself; ``softcap`` bounds the scores by ``cap * tanh(s / cap)``; ``sinks`` says that
    each query head has a learned logit in the denominator of its softmax. ``latent``: the values are the keys' first
    ``value_dim`` channels and are not stored beside them (multi-head latent attention in its absorbed form).
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    chunked: bool = False
    latent: bool = False

    @property
    def stored_dim(self) -> int:
        """Elements of a KV head's key and value that are stored."""
        return self.key_dim if self.latent else self.key_dim + self.value_dim

    def first_seen(self, position: int) -> int:
        """The first token that the query at ``position`` sees."""
        if self.window is None:
            return 0
        return position // self.window * self.window if self.chunked else max(0, position - self.window + 1)

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class StateShape:
    """A state of a recurrent layer: of one size for each sequence, changed by every token.

    ``layer`` is the model's number of the layer; ``kind`` is ``conv`` (the last inputs of a short convolution) or
    ``recurrent``; ``number`` counts the layer's states of a kind. ``wide``: float32, whatever the model computes in.
    ``stored``: bytes of an element where it lies (``None``: as it is computed).
    """

    layer: int
    kind: str
    number: int
    shape: tuple[int, ...]
    wide: bool
    stored: int | None = None

    def computed(self, itemsize: int) -> int:
        """Bytes of an element as its layer computes it, where the model's dtype has ``itemsize``."""
        return 4 if self.wide else itemsize

    def nbytes(self, itemsize: int) -> int:
        """Bytes, where an element of the model's dtype has ``itemsize``."""
        return prod(self.shape) * (self.stored or self.computed(itemsize))


@dataclass(frozen=True)
class ModelGeometry:
    """What the cache must know of a model.

    ``layers`` are those with attention; ``places`` the model's numbers of them, where there are others between (empty:
    all have attention). ``states``: what recurrent layers keep of a sequence. ``shared``: layers that store nothing, by
    the model's numbers, each with the earlier layer of ``layers`` whose keys and values it reads. ``expanded``: why
    every head's keys and values are cached of a model that has latents.
    """

    name: str
    layers: tuple[LayerGeometry, ...]
    max_position: int
    vocab_size: int
    places: tuple[int, ...] = ()
    states: tuple[StateShape, ...] = ()
    shared: tuple[tuple[int, int], ...] = ()
    expanded: str = field(default="", compare=False)

    @property
    def latent(self) -> bool:
        """Whether a layer caches latents."""
        return any(layer.latent for layer in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def refuse_states(self, what: str) -> None:
        """Raise ``UnsupportedError`` for a model with recurrent layers; ``what`` has no place for their states."""
        places = sorted({state.layer for state in self.states})
        if places:
            raise UnsupportedError(
                f"{what} has no place for the states of recurrent layers; {self.name} has {len(places)} of them, the "
                f"first is layer {places[0]}"
            )

    def refuse_latents(self, what: str) -> None:
        """Raise ``UnsupportedError`` for a model whose layers cache latents, which ``what`` cannot do."""
        if self.latent:
            raise UnsupportedError(
                f"{what} does not work with cached latents, which the attention of {self.name} has; with --disable-mla "
                "every head's keys and values are cached"
            )

    def stored_in(self, state_dtype: str) -> ModelGeometry:
        """The same with ``recurrent`` states in one of :data:`STATE_DTYPES`; the inputs of short convolutions stay.

        Raises ``ConfigError`` for a dtype where the model has no such states.
        """
        check_state_dtype(state_dtype)
        if state_dtype == AUTO:
            return self
        if not any(state.kind == "recurrent" for state in self.states):
            raise ConfigError(f"state_dtype is '{state_dtype}'; {self.name} has no recurrent states")
        size = 4 if state_dtype == "float32" else 2
        states = (replace(s, stored=size) if s.kind == "recurrent" else s for s in self.states)
        return replace(self, states=tuple(states))

    def refuse_shared(self, what: str) -> None:
        """Raise ``UnsupportedError`` for a model whose layers share keys and values, which ``what`` cannot do."""
        if self.shared:
            place, source = self.shared[0]
            raise UnsupportedError(
                f"{what} cannot do layers that share keys and values; layer {place} of {self.name} reads those of "
                f"layer {source}"
            )

    def refuse_chunks(self, what: str) -> None:
        """Raise ``UnsupportedError`` for a model that attends in chunks, which ``what`` cannot do."""
        if any(layer.chunked for layer in self.layers):
            raise UnsupportedError(f"{what} cannot do the chunked attention of {self.name}")

    def source_of(self, place: int) -> int:
        """The model's layer whose keys and values its layer ``place`` reads: itself, or an earlier one."""
        return next((source for layer, source in self.shared if layer == place), place)

    def index_of(self, place: int) -> int:
        """Which of ``layers`` the model's layer ``place`` reads."""
        source = self.source_of(place)
        return self.places.index(source) if self.places else source

    def read_again(self, place: int) -> bool:
        """Whether a layer after ``place`` reads the same keys and values."""
        source = self.source_of(place) if self.shared else place
        return any(layer > place and of == source for layer, of in self.shared)

    def bytes_per_token_16bit(self) -> int:
        """Bytes of one token's keys and values at 16 bits."""
        return sum(2 * g.num_kv_heads * g.stored_dim for g in self.layers)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int) -> int:
    """Turn ``"256MiB"``, ``"1.5GB"`` or a plain number into bytes.

    Raises ``ConfigError`` when the text is no size or the size is not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"'{text}' is not a size in bytes; write for example 256MiB, 1.5GB or 1073741824")
    size = int(Decimal(match.group(1)) * unit)
    if size <= 0:
        raise ConfigError(f"the size '{text}' is {size} bytes; it must be positive")
    return size


def check_state_dtype(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` is one of :data:`STATE_DTYPES`."""
    if name not in STATE_DTYPES:
        raise ConfigError(f"state_dtype is '{name}'; choose from {', '.join(STATE_DTYPES)}")


def pages_of(tokens: int) -> int:
    """Pages that ``tokens`` tokens touch."""
    return -(-tokens // PAGE_TOKENS)


def align(size: int) -> int:
    """``size`` rounded up to a whole number of cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT
