"""The tier for vLLM's offload without vLLM: where rows lie, what is refused, what is kept.

tests/with_vllm/test_tier.py runs it inside vLLM's offload.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbits.codecs import LayerRounding, Policy, Rounding, parse_policy
from kvbits.codecs.policy_file import save_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.errors import CacheError, ConfigError, UnsupportedError
from kvbits.kernels.chunks import HEADER_BYTES
from kvbits.vllm.chunk_plan import ChunkPlan
from kvbits.vllm.kept import Kept, KeptInFiles, KeptInMemory
from kvbits.vllm.rows import LAYOUTS, RowLayout

HEADS, DIM = 4, 32


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_lies_where_the_layout_says(name: str, layers: int) -> None:
    """By counting: axes in the layout's order, a key before its value, blocks that begin with ``B`` all of one size."""
    layout = RowLayout(name, workers=2, layers=3, blocks=2, tokens=4, heads=2, head_size=2)
    row = torch.arange(layout.part_bytes, dtype=torch.int16).view(torch.uint8)
    sizes = {"L": layers, "B": 2, "H": 2, "N": 4}
    for worker, share in enumerate(layout.shares(row, layers, torch.int16)):
        assert share.shape == (2, layers, 2, 4, 2, 2)
        for value, layer, block, token, head, dim in itertools.product(*(range(n) for n in share.shape)):
            at = {"L": layer, "B": block, "N": token, "H": head}
            place = 0
            for axis in name.removesuffix("C"):
                place = place * sizes[axis] + at[axis]
            place = place * 4 + value * 2 + dim
            if name[0] == "B":  # room for three layers in every block
                place += block * (3 - layers) * 2 * 4 * 4
            assert share[value, layer, block, token, head, dim] == worker * layout.part_bytes // 2 + place


def config(**changes: Any) -> SimpleNamespace:
    """As much of vLLM's ``OffloadingConfig`` as is looked at: two groups of layers, 16 tokens a block, 4 blocks."""
    groups = (("model.layers.0.attn", "model.layers.2.attn"), ("model.layers.1.attn",))
    found = SimpleNamespace(
        groups=tuple(SimpleNamespace(tokens_per_block=16, layer_names=n, group_id=2 * i) for i, n in enumerate(groups)),
        worker_kv_bytes_per_block=4 * 2 * 16 * HEADS * DIM, canonical_layout=False, replicated_layout=False,
        model=SimpleNamespace(name="some/model", dtype="bfloat16"), cache=SimpleNamespace(blocks_per_chunk=4),
        parallel=SimpleNamespace(world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1), kv_cache_layout="LBNHC",
    )  # fmt: skip
    for path, value in changes.items():
        *owner, name = path.split("__")
        target = found
        for part in owner:
            target = getattr(target, part)
        setattr(target, name, value)
    return found


@pytest.mark.parametrize(
    ("changes", "policy", "error", "says"),
    [
        ({"model__dtype": "fp8"}, "int4", UnsupportedError, "the cache is fp8"),
        ({"kv_cache_layout": "LHBNC"}, "int4", UnsupportedError, "LHBNC; set VLLM_KV_CACHE_LAYOUT"),
        ({"kv_cache_layout": None}, "int4", UnsupportedError, "layout is None"),
        ({"canonical_layout": True}, "int4", UnsupportedError, "canonical"),
        ({"replicated_layout": True}, "int4", UnsupportedError, "replicated"),
        ({"parallel__pp_size": 2}, "int4", UnsupportedError, "pp_size 2"),
        ({"parallel__dcp_size": 2}, "int4", UnsupportedError, "dcp_size 2"),
        ({"parallel__tp_size": 8, "parallel__world_size": 8}, "int4", UnsupportedError, "4 KV heads on 8 workers"),
        ({"cache__blocks_per_chunk": 1}, "int4", UnsupportedError, "16 tokens is no whole page of 64; set .* to 4"),
        ({"worker_kv_bytes_per_block": 1024}, "int4", ConfigError, "4096 bytes; 2 layers of 4 heads of 32"),
        ({}, "int44", ConfigError, "int44"),
        ({}, "int4+sink:int8", UnsupportedError, "first page"),
        ({}, "0-3:int4", ConfigError, "layers are 0 to 2"),
        ({}, "policy:/nowhere", ConfigError, "some/model"),
        ({}, {"int4": 1}, ConfigError, "'policy'"),
    ],
)
def test_what_cannot_work_is_named(changes: dict, policy: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ChunkPlan.of(config(**changes), policy, HEADS, DIM)


def test_large_blocks_and_unequal_ones_are_named() -> None:
    large = config(kv_cache_layout="LBHNC", worker_kv_bytes_per_block=4 * 2 * 128 * HEADS * DIM)
    for group in large.groups:
        group.tokens_per_block = 128
    with pytest.raises(UnsupportedError, match="--block-size 64"):
        ChunkPlan.of(large, "int4", HEADS, DIM)
    large.groups[0].tokens_per_block = 64
    with pytest.raises(UnsupportedError, match=r"\[64, 128\] tokens"):
        ChunkPlan.of(large, "int4", HEADS, DIM)
    with pytest.raises(ConfigError, match="'kv_heads'"):
        ChunkPlan.of(config(), "int4", 0, DIM)
    with pytest.raises(ConfigError, match="'head_size'"):
        ChunkPlan.of(config(), "int4", HEADS, "32")  # type: ignore[arg-type]


def test_groups_have_their_layers_of_the_policy() -> None:
    plan = ChunkPlan.of(config(), "0:int8,1:int4,2:int3", HEADS, DIM)
    found = {group: [s.name for s in coder.policy.layers] for group, coder in plan.coders.items()}
    assert found == {0: ["int8", "int3"], 2: ["int4"]}


def test_a_calibrated_policy_codes_as_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another checkpoint's is refused; a group's layers have their own tables, a worker's heads theirs."""
    monkeypatch.setattr("kvbits.models.fingerprint.fingerprint_of", lambda name: "f" * 16)
    layer = LayerGeometry(HEADS, HEADS, DIM, DIM, 1.0)
    generator = torch.Generator().manual_seed(2)
    tables = [torch.randn(HEADS, DIM, DIM, generator=generator).triu(1) * 0.05 for _ in range(3)]
    rounding = tuple(LayerRounding(Rounding(feedback=t), Rounding()) for t in tables)
    policy = Policy("ours", parse_policy("int4", 3).layers, rounding=rounding)
    geometry = ModelGeometry("some/model", (layer,) * 3, 1, 1)
    for name, fingerprint in (("own", "f" * 16), ("other", "0" * 16)):
        save_policy(tmp_path / name, policy, geometry, fingerprint, {})
    two = {"parallel__tp_size": 2, "parallel__world_size": 2, "worker_kv_bytes_per_block": 4 * 2 * 16 * 2 * DIM}
    plan = ChunkPlan.of(config(**two), f"policy:{tmp_path / 'own'}", HEADS, DIM)
    row = torch.randn(2 * plan.rows.part_bytes // 2, generator=generator).bfloat16().view(torch.uint8)
    data = plan.encode(row, 2)
    key = policy.layers[1].key
    rows = torch.cat([s[0, 0].flatten(0, 1) for s in plan.rows.shares(row, 1, torch.bfloat16)], dim=1)
    expected = key.encode(rows.float().transpose(0, 1)[None], "key", rounding[1].key)
    assert torch.equal(data[HEADER_BYTES : HEADER_BYTES + expected.numel()].view_as(expected), expected)
    with pytest.raises(ConfigError, match="was calibrated for"):
        ChunkPlan.of(config(), f"policy:{tmp_path / 'other'}", HEADS, DIM)


def test_another_models_chunk_is_refused() -> None:
    row = torch.zeros(4 * 4 * 2 * 16 * HEADS * DIM, dtype=torch.uint8)
    data = ChunkPlan.of(config(), "int4", HEADS, DIM).encode(row, 0)
    for changes, policy, says in (
        ({"model__name": "else"}, "int4", "model 'some/model' instead of 'else'"),
        ({"model__dtype": "float16"}, "int4", "dtype 'bfloat16' instead of 'float16'"),
        ({}, "int8", "too few|policy"),
    ):
        other = ChunkPlan.of(config(**changes), policy, HEADS, DIM)
        assert other.directory != ChunkPlan.of(config(), "int4", HEADS, DIM).directory
        with pytest.raises(CacheError, match=says):
            other.decode(data, row, 0)
        assert not row.any()


@pytest.fixture(params=["memory", "files"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    return KeptInMemory(1000) if request.param == "memory" else KeptInFiles(1000, tmp_path / "a" / "b")


def put(kept: Kept, key: bytes, size: int) -> torch.Tensor:
    data = torch.arange(size, dtype=torch.uint8)
    kept.write(key, data)
    kept.add(key, size)
    return data


def test_the_least_recently_used_goes(kept: Kept) -> None:
    data = {key: put(kept, key, 400) for key in (b"a", b"b")}
    kept.touch([b"a", b"unknown"])
    put(kept, b"c", 300)
    assert [key in kept for key in (b"a", b"b", b"c")] == [True, False, True]
    assert torch.equal(kept.read(b"a"), data[b"a"])
    with pytest.raises((CacheError, OSError)):
        kept.read(b"b")
    put(kept, b"d", 2000)  # more than there is room for
    assert (len(kept), kept.nbytes) == (0, 0)


def test_a_key_that_comes_again_counts_once(kept: Kept) -> None:
    put(kept, b"a", 400)
    put(kept, b"a", 300)
    assert (len(kept), kept.nbytes) == (1, 300)
    kept.drop(b"a")
    kept.drop(b"a")
    assert (len(kept), kept.nbytes) == (0, 0)


def test_files_that_were_there_count(tmp_path: Path) -> None:
    put(KeptInFiles(1000, tmp_path), b"a", 400)
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "xyz.kvbits").write_text("no key")
    again = KeptInFiles(1000, tmp_path)
    assert len(again) == 1
    assert torch.equal(again.read(b"a"), torch.arange(400, dtype=torch.uint8))
    assert len(KeptInFiles(300, tmp_path)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "xyz.kvbits"]


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be kept in"):
        KeptInFiles(1000, tmp_path / "file" / "below")


def test_a_damaged_file_is_no_chunk(tmp_path: Path) -> None:
    plan, kept = ChunkPlan.of(config(), "int4", HEADS, DIM), KeptInFiles(1 << 20, tmp_path)
    row = torch.randn(2 * plan.rows.part_bytes // 4).bfloat16().view(torch.uint8)
    kept.write(b"a", plan.encode(row, 0))
    before, (path,) = row.clone(), tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:3], bytes([whole[0] ^ 1]) + whole[1:], whole[:-9] + b"\x55" + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match=r"damaged|empty|mark|too few"):
            plan.decode(kept.read(b"a"), row, 0)
        assert torch.equal(row, before)


def test_what_cannot_be_erased_is_given_up(tmp_path: Path) -> None:
    kept = KeptInFiles(1000, tmp_path)
    put(kept, b"a", 400)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        kept.read(b"a")
    kept.drop(b"a")
    assert (b"a" in kept, kept.nbytes) == (False, 0)
