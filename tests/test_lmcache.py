"""kvbits as a serializer of LMCache, through LMCache's own factory and thread pool; left out where it or what it needs
(numba, cryptography, cachetools, ...) is not installed."""

from __future__ import annotations

import select
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache.v1.distributed.serde")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde.base import SerdeConfig
from lmcache.v1.distributed.serde.factory import create_serde_processor
from lmcache.v1.distributed.serde.utils import serialized_layout_desc
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

import kvbits.lmcache  # noqa: F401 (registers)
from kvbits.errors import ConfigError, UnsupportedError

OPTIONS = {"policy": "int4", "kv_heads": 2, "head_size": 64, "layers": 3}
SHAPE = torch.Size([2, 3, 200, 128])


def memory(shape: torch.Size, dtype: torch.dtype) -> TensorMemoryObj:
    raw = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8)
    meta = MemoryObjMetadata(
        shape=shape, dtype=dtype, address=0, phy_size=len(raw), ref_count=1, fmt=MemoryFormat.KV_2LTD,
        shapes=[shape], dtypes=[dtype],
    )  # fmt: skip
    return TensorMemoryObj(raw, meta, None)


def wait(fd: int, query: Any, task: int) -> bool:
    assert select.select([fd], [], [], 60)[0]
    found: bool = query(task)
    return found


def test_a_chunk_goes_through_lmcache_and_back() -> None:
    serde = create_serde_processor(SerdeConfig("kvbits", dict(OPTIONS)))
    layout = MemoryLayoutDesc([SHAPE], [torch.bfloat16])
    stored = serialized_layout_desc(layout, serde)
    source, back = memory(SHAPE, torch.bfloat16), memory(SHAPE, torch.bfloat16)
    source.tensor.copy_(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    kept = memory(stored.shapes[0], torch.uint8)
    key = ObjectKey(b"x" * 32, "some/model", 0)
    task = serde.submit_serialize([source], [kept], [key])
    assert wait(serde.get_serialize_event_fd(), serde.query_serialize_result, task)
    task = serde.submit_deserialize([kept], [back], [key])
    assert wait(serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
    error = (back.tensor.float() - source.tensor.float()).pow(2).mean().sqrt()
    assert 0.01 < error < 0.12  # 4 bits of a normal distribution
    assert torch.equal(back.tensor[:, :, 192:], source.tensor[:, :, 192:])
    before = back.tensor.clone()
    for name, flipped in (("another/model", 0), ("some/model", 1)):
        kept.tensor[5000] ^= flipped
        task = serde.submit_deserialize([kept], [back], [ObjectKey(b"x" * 32, name, 0)])
        assert not wait(serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
        assert torch.equal(back.tensor, before)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"policy": "int44"}, ConfigError, "int44"),
        ({"policy": "int4+sink:int8"}, UnsupportedError, "first page"),
        ({"policy": "policy:/nowhere"}, ConfigError, "'model'"),
        ({"kv_heads": 0}, ConfigError, "'kv_heads'"),
        ({"head_size": "64"}, ConfigError, "'head_size'"),
        ({"layers": None}, ConfigError, "'layers'"),
        ({"max_workers": 0}, ConfigError, "'max_workers'"),
        ({"bits": 4}, ConfigError, "'bits'"),
    ],
)
def test_options_that_cannot_be_are_named(changes: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        create_serde_processor(SerdeConfig("kvbits", {**OPTIONS, **changes}))
