"""kvbits as a secondary tier of vLLM's offload, through vLLM's own factory and tiering manager (no engine, no GPU)."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm_blocks import DIM, GROUPS, HEADS, Model, Worker
from torch import Tensor
from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvbits.codecs import parse_policy
from kvbits.errors import ConfigError
from kvbits.vllm.tier import KvbitsFileTier, KvbitsTier

pytestmark = pytest.mark.vllm

POLICY = "0:int8,1-3:int4,4:nf4"
TIER = {"type": "KvbitsTier", "module_path": "kvbits.vllm.tier", "policy": POLICY, "kv_heads": HEADS,
        "head_size": DIM, "capacity_bytes": 1 << 24}  # fmt: skip


class Offload:
    """vLLM's offload with one tier: a scheduler's manager, and the workers that copy blocks."""

    def __init__(self, model: Model, tier: dict[str, Any]) -> None:
        extra = {"cpu_bytes_to_use": 1 << 22, "secondary_tiers": [{**TIER, **tier}]}
        self.model = model
        self.spec = TieringOffloadingSpec(model.config(extra, engine=uuid.uuid4().hex))
        self.manager = self.spec.get_manager()
        self.workers = [Worker(model, rank, self.spec) for rank in range(model.workers)]
        self.request = ReqContext("one")
        self.manager.on_new_request(self.request)

    @property
    def tier(self) -> KvbitsTier:
        return self.manager.secondary_tiers[0]

    def step(self) -> None:
        """The end of a scheduler's step, when every copy has ended."""
        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        self.tier.drain_jobs()

    def store(self, key: bytes, group: int, blocks: list[int]) -> None:
        (chunk,) = self.manager.prepare_store([key], self.request).store_spec.chunk_ids
        for worker in self.workers:
            worker.move(int(chunk), group, blocks, out=True)
        self.manager.complete_store([key], self.request)
        self.step()

    def load(self, key: bytes, group: int, blocks: list[int]) -> LookupResult:
        """As a scheduler does: look up until the chunk is in host memory, then copy it to ``blocks``."""
        found = self.manager.lookup(key, self.request)
        if found is LookupResult.HIT_PENDING:
            self.step()
            found = self.manager.lookup(key, self.request)
        if found is LookupResult.HIT:
            (chunk,) = self.manager.prepare_load([key], self.request).chunk_ids
            for worker in self.workers:
                worker.move(int(chunk), group, blocks, out=False)
            self.manager.complete_load([key], self.request)
        return found

    def forget(self) -> None:
        """Host memory forgets, the tier does not."""
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):  # 0.33
            self.manager.on_reset_flushed()

    def rows(self, layer: str, blocks: list[int]) -> Tensor:
        """``[heads, tokens, 2 * dim]`` of a layer, all workers' heads."""
        return torch.cat([w.caches[layer][blocks].transpose(0, 1).flatten(1, 2) for w in self.workers])

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.manager.shutdown()


@pytest.fixture
def offloads() -> Iterator[Any]:
    made: list[Offload] = []

    def make(model: Model, **tier: Any) -> Offload:
        made.append(Offload(model, tier))
        return made[-1]

    yield make
    while made:
        made.pop().close()


def expected(rows: Tensor, layer: str) -> Tensor:
    """``rows`` after the codecs of the layer, in torch."""
    index = sorted(name for group in GROUPS for name in group).index(layer)
    scheme = parse_policy(POLICY, 5).layers[index]
    found = []
    for codec, side, part in zip((scheme.key, scheme.value), ("key", "value"), rows.split(DIM, -1), strict=True):
        pages = part.bfloat16().float().unflatten(1, (-1, 64)).transpose(0, 1)  # [pages, heads, 64, dim]
        coded = codec.decode(codec.encode(pages.contiguous(), side), DIM, side)
        found.append(coded.transpose(0, 1).flatten(1, 2).bfloat16().to(rows.dtype))
    return torch.cat(found, -1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("layout", "tokens", "blocks", "dtype"),
    [
        ("LBNHC", 16, 4, torch.bfloat16), ("LBNHC", 64, 2, torch.float16), ("LBHNC", 16, 8, torch.bfloat16),
        ("BLNHC", 32, 2, torch.bfloat16), ("BLHNC", 16, 4, torch.float16), ("BHLNC", 64, 1, torch.bfloat16),
    ],
)  # fmt: skip
def test_chunks_come_back_as_their_codecs_say(
    offloads: Any, layout: str, tokens: int, blocks: int, dtype: torch.dtype, workers: int
) -> None:
    """Two groups of layers that share memory; the rows of other blocks and groups stay as they are."""
    run = offloads(Model(layout, tokens, blocks, workers, dtype))
    keys = [make_offload_key(bytes([i]) * 32, group) for i, group in enumerate((0, 1))]
    places = [[5, 2, 9, 1, 7, 0, 3, 4][:blocks], [12, 17, 11, 10, 13, 15, 14, 16][:blocks]]
    back = list(range(18, 18 + 6))[:blocks] if blocks <= 6 else [*range(18, 24), 6, 8]
    for group, key in enumerate(keys):
        run.store(key, group, places[group])
    run.forget()
    for group, key in enumerate(keys):
        before = {name: run.rows(name, places[group]) for name in GROUPS[group]}
        assert run.load(key, group, back) is LookupResult.HIT
        for name in GROUPS[group]:
            assert torch.equal(run.rows(name, back), expected(before[name], name))
            assert torch.equal(run.rows(name, places[group]), before[name])
    bytes_of_rows = sum(4 * len(names) * tokens * blocks * HEADS * DIM for names in GROUPS)
    assert run.tier._kept.nbytes < bytes_of_rows / 2 + 2 * 1024


def test_what_was_used_longest_ago_makes_room(offloads: Any) -> None:
    run = offloads(Model("LBNHC", 64, 1), capacity_bytes=80_000)
    keys = [make_offload_key(bytes([i]) * 32, 0) for i in range(3)]
    for i, key in enumerate(keys[:2]):
        run.store(key, 0, [i])
    run.step()
    assert {run.tier.lookup(k, run.request) for k in keys[:2]} == {LookupResult.HIT}
    run.manager.touch(keys[:1], run.request)
    run.store(keys[2], 0, [2])
    run.forget()
    found = [run.tier.lookup(key, run.request) for key in keys]
    assert found == [LookupResult.HIT, LookupResult.MISS, LookupResult.HIT]
    assert run.tier._kept.nbytes <= 80_000


def test_a_second_store_moves_nothing(offloads: Any) -> None:
    run = offloads(Model("LBNHC", 64, 1))
    key = make_offload_key(b"k" * 32, 0)
    run.store(key, 0, [1])
    run.forget()
    run.manager.on_new_request(run.request)
    run.store(key, 0, [1])
    (result,) = run.tier.get_finished_jobs()
    assert result.success
    assert result.transfer_bytes == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"capacity_bytes": 64}, "one chunk takes"),
        ({"capacity_bytes": True}, "'capacity_bytes'"),
        ({"threads": 0}, "'threads'"),
    ],
)
def test_options_that_cannot_be_are_named(offloads: Any, changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        offloads(Model("LBNHC", 64, 1), **changes)


class TestFiles:
    """The tier's files outlive an engine, and belong to one model, policy and kind of chunk."""

    KEY = make_offload_key(b"f" * 32, 0)

    def stored(self, offloads: Any, root: Path, **changes: Any) -> Offload:
        run = offloads(Model("LBNHC", 64, 1), type="KvbitsFileTier", root_dir=str(root), **changes)
        assert run.tier.medium is Medium.STORAGE
        return run

    def test_another_engine_finds_them(self, offloads: Any, tmp_path: Path) -> None:
        first = self.stored(offloads, tmp_path)
        first.store(self.KEY, 0, [3])
        before = {name: first.rows(name, [3]) for name in GROUPS[0]}
        second = self.stored(offloads, tmp_path)
        assert second.load(self.KEY, 0, [20]) is LookupResult.HIT
        for name in GROUPS[0]:
            assert torch.equal(second.rows(name, [20]), expected(before[name], name))

    def test_another_policy_does_not(self, offloads: Any, tmp_path: Path) -> None:
        self.stored(offloads, tmp_path).store(self.KEY, 0, [3])
        other = self.stored(offloads, tmp_path, policy="int8")
        assert other.manager.lookup(self.KEY, other.request) is LookupResult.MISS

    @pytest.mark.parametrize("damage", ["a bit", "the end", "another's", "gone"])
    def test_damage_is_a_miss(self, offloads: Any, tmp_path: Path, damage: str) -> None:
        """Nothing reaches host memory, the file goes, and vLLM computes the chunk again."""
        run = self.stored(offloads, tmp_path)
        run.store(self.KEY, 0, [3])
        run.forget()
        (path,) = tmp_path.rglob("*.kvbits")
        data = bytearray(path.read_bytes())
        if damage == "a bit":
            data[5000] ^= 4
        elif damage == "the end":
            data = data[:-100]
        elif damage == "another's":
            other = self.stored(offloads, tmp_path / "other", policy="int8")
            other.store(self.KEY, 0, [3])
            data = bytearray(next((tmp_path / "other").rglob("*.kvbits")).read_bytes())
        path.write_bytes(data)
        if damage == "gone":
            path.unlink()
        before = run.tier._rows.clone()
        assert run.load(self.KEY, 0, [20]) is LookupResult.MISS
        assert torch.equal(run.tier._rows, before)
        assert not path.exists()


def test_every_method_of_the_interface_is_there() -> None:
    """With the parameters that vLLM's own have."""
    for tier in (KvbitsTier, KvbitsFileTier):
        assert not tier.__abstractmethods__
        for name, method in inspect.getmembers(SecondaryTierManager, inspect.isfunction):
            if not name.startswith("__"):
                theirs, ours = (inspect.signature(m).parameters for m in (method, getattr(tier, name)))
                assert list(theirs) == list(ours), name
