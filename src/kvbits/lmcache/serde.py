"""``Serializer`` and ``Deserializer`` of LMCache (``lmcache/v1/distributed/serde/base.py``) over kvbits' chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, Serializer
from torch import Tensor

from kvbits.codecs import policy_of
from kvbits.config import POLICY_PREFIX, LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels.chunks import ChunkCoder

_OPTIONS = ("policy", "kv_heads", "head_size", "layers", "model", "max_workers")


class KvbitsSerializer(Serializer):
    """Keys and values ``[2, layers, tokens, kv_heads * head_size]`` in bfloat16 or float16 into a chunk's bytes."""

    def __init__(self, coder: ChunkCoder) -> None:
        self._coder = coder

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        return self._coder.encode([self._coder.heads(_tensor(src))], key.model_name, _bytes(dst))

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """The bytes exactly: a tier keeps whatever is allocated."""
        (shape,), (dtype,) = _only(layout_desc.shapes), _only(layout_desc.dtypes)
        chunk = self._coder.heads(torch.empty(shape, dtype=dtype, device="meta"))
        return self._coder.size(self._coder.format("", chunk.shape[2], dtype).tokens)


class KvbitsDeserializer(Deserializer):
    """Back; bytes of another model, policy or shape are refused by name, and damaged ones."""

    def __init__(self, coder: ChunkCoder) -> None:
        self._coder = coder

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        self._coder.decode(_bytes(src), key.model_name, [self._coder.heads(_tensor(dst))])


def create_serde(options: Mapping[str, Any]) -> AsyncSerdeProcessor:
    """From the options of a tier's ``serde``: ``policy``, ``kv_heads``, ``head_size``, ``layers`` and, for a calibrated
    policy, ``model`` (its directory or Hugging Face id); ``max_workers`` threads (1).

    Raises ``ConfigError`` or ``UnsupportedError`` for what cannot work.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ConfigError(f"'{unknown[0]}' is no option of kvbits' serde; choose from {', '.join(_OPTIONS)}")
    kv_heads, head_size, layers = (_positive(options, name) for name in ("kv_heads", "head_size", "layers"))
    text, model = str(options.get("policy", "")), options.get("model")
    layer = LayerGeometry(kv_heads, kv_heads, head_size, head_size, 1.0)
    geometry = ModelGeometry(str(model or "the model"), (layer,) * layers, 1, 1)
    fingerprint = None
    if text.startswith(POLICY_PREFIX):
        if model is None:
            raise ConfigError(f"the policy '{text}' is calibrated for one model: name it as 'model'")
        from kvbits.models.fingerprint import fingerprint_of

        fingerprint = fingerprint_of(str(model))
    coder = ChunkCoder(policy_of(text, geometry, fingerprint), kv_heads, head_size)
    workers = _positive({"max_workers": 1, **options}, "max_workers")
    return AsyncSerdeProcessor(KvbitsSerializer(coder), KvbitsDeserializer(coder), max_workers=workers)


def _positive(options: Mapping[str, Any], name: str) -> int:
    value = options.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"'{name}' of kvbits' serde is {value!r}; it must be a positive whole number")
    return value


def _only(listed: Any) -> Any:
    if len(listed) != 1:
        raise UnsupportedError(f"a chunk is made of {len(listed)} groups of layers; kvbits' serde takes one")
    return listed


def _tensor(memory: Any) -> Tensor:
    tensor: Tensor | None = memory.tensor
    if tensor is None:
        raise UnsupportedError("LMCache hands over memory without a tensor")
    return tensor


def _bytes(memory: Any) -> Tensor:
    """``uint8 [bytes]``, never a copy."""
    return _tensor(memory).view(-1).view(torch.uint8)
