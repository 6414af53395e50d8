"""kvbits' codecs as a serializer of LMCache: blocks that leave an engine's 16-bit cache are kept in fewer bits.

``import kvbits.lmcache`` in LMCache's process, then ``"serde": {"type": "kvbits", "policy": "int4", "kv_heads": 8,
"head_size": 128}`` in the configuration of a tier. docs/vllm.md says more.
"""

from __future__ import annotations

from lmcache.v1.distributed.serde.factory import get_registered_serde_types, register_serde_factory

from kvbits.lmcache.serde import KvbitsDeserializer, KvbitsSerializer, create_serde

__all__ = ["KvbitsDeserializer", "KvbitsSerializer", "create_serde"]

NAME = "kvbits"

if NAME not in get_registered_serde_types():
    register_serde_factory(NAME, create_serde)
