"""Calibration: what the gradients predict, the allocation, and the files."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from kvbits.attention import Forward
from kvbits.calibration.allocate import allocate, cheapest_within, total_cost
from kvbits.calibration.collect import Statistics, TensorSample, collect
from kvbits.calibration.dense import DenseBackend
from kvbits.calibration.fit import FittedCodec, fit, ordered_feedback
from kvbits.calibration.policy import NAMES, Planner
from kvbits.calibration.texts import split_windows
from kvbits.codecs import SCHEMES, LayerRounding, Policy, PoolLayout, Rounding, parse_policy, policy_of
from kvbits.codecs.hadamard import rotate
from kvbits.codecs.policy_file import load_policy, save_policy
from kvbits.config import ModelGeometry
from kvbits.errors import ConfigError
from kvbits.evaluation.selftext import write_windows
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models import LoadedModel
from kvbits.models.load import wrap
from kvbits.pool import PagedPool

CONTEXT = 256


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return wrap(tiny_model("llama", head_dim=32), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(4, 97) for _ in range(CONTEXT)] for _ in range(2)]


@pytest.fixture(scope="module")
def statistics(loaded: LoadedModel, windows: list[list[int]]) -> Statistics:
    return collect(loaded, windows)


@pytest.fixture(scope="module")
def table(statistics: Statistics) -> list[list[FittedCodec]]:
    return fit(statistics, NAMES)


def logits_of(loaded: LoadedModel, backend: DenseBackend | ReferenceBackend, window: list[int]) -> torch.Tensor:
    policy = parse_policy("bf16", loaded.geometry.num_layers)
    layout = PoolLayout.of(loaded.geometry, policy)
    pool = PagedPool(loaded.geometry, policy, layout.frames_of(len(window)) * layout.frame_bytes)
    pages = len(window) // 64
    frames = list(range(layout.open.frames))
    sealed = list(range(layout.open.frames, layout.open.frames + pages))
    batch = BatchLayout.of([SequencePages(0, len(window), sealed, frames, frames)])
    step = Forward(pool, backend, batch)
    rows = torch.arange(len(window))
    with torch.no_grad():
        return loaded.forward(torch.tensor(window), rows, step, rows)


def test_dense_attention_is_the_cache_s_at_16_bit(loaded: LoadedModel, windows: list[list[int]]) -> None:
    expected = logits_of(loaded, ReferenceBackend(), windows[0])
    got = logits_of(loaded, DenseBackend(), windows[0])
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()  # the cache rounds its rows to bfloat16


def test_samples_leave_out_the_first_page_and_hold_bfloat16(statistics: Statistics, loaded: LoadedModel) -> None:
    assert len(statistics.samples) == 2 * loaded.geometry.num_layers
    for sample in statistics.samples:
        assert sample.rows.shape == sample.gradients.shape == (2 * (CONTEXT // 64 - 1), 2, 64, 32)
        assert sample.rows.dtype == sample.gradients.dtype == torch.bfloat16
        assert sample.windows == 2
        # nothing reads the last page as a code
        assert not sample.gradients[CONTEXT // 64 - 2].any()
        assert sample.gradients[0].any()
    assert statistics.scored == CONTEXT
    for moment in statistics.queries:
        assert (torch.linalg.eigvalsh(moment) > -1e-3).all()


def test_more_bits_cost_less_and_fitted_rounding_no_more(
    statistics: Statistics, table: list[list[FittedCodec]]
) -> None:
    for sample, row in zip(statistics.samples, table, strict=True):
        costs = {choice.name: choice.cost for choice in row}
        assert costs["int8"] < costs["int5"] < costs["int3"] < costs["int2"]
        codec = SCHEMES["int2"].key if sample.side == "key" else SCHEMES["int2"].value
        page = codec.encode(sample.rows.float(), sample.side)
        plain = float(sample.cost(codec.decode(page, 32, sample.side)).sum())
        assert costs["int2"] <= plain / statistics.scored * (1 + 1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_errors_that_tokens_share_cost_more(shared: bool) -> None:
    """1,200 tokens of equal gradients: independent errors add in squares, equal ones add up."""
    windows, pages, size = 6, 10, 0.1
    rows = torch.zeros(windows * pages, 2, 64, 16)
    sample = TensorSample(0, "value", rows.bfloat16(), torch.ones_like(rows).bfloat16(), windows)
    signs = torch.randint(0, 2, rows.shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    # Within a window all tokens err alike; from window to window the sign changes.
    alike = (torch.arange(windows) % 2 * 2.0 - 1).repeat_interleave(pages).view(-1, 1, 1, 1).expand_as(rows)
    error = size / 16 * (alike if shared else signs * 4)
    tokens = windows * pages * 64
    # Of a token: (sum of 16 channels)^2; equal errors give 0.1^2, independent ones 16 (0.1 / 4)^2 = 0.1^2 on average.
    expected = tokens * size**2 / 2 * (pages * 64 if shared else 1)
    measured = sample.cost(error)
    assert measured.shape == (2,)
    assert 0.8 < float(measured[0]) / expected < 1.3, (measured, expected)


def test_a_rotated_dtype_is_fed_back_in_its_own_channels(statistics: Statistics) -> None:
    """Under ``E[q q^T]`` the fed back keys err less than those rounded to nearest, which a wrong metric undoes."""
    sample, moment = statistics.samples[2], statistics.queries[1]
    rows = sample.rows.float()
    codec = SCHEMES["nf4"].key
    (choice,) = fit(replace(statistics, samples=(sample,)), ["nf4"])[0]

    def error(rounding: Rounding) -> float:
        d = codec.decode(codec.encode(rows, "key", rounding), rows.shape[-1], "key") - rows
        return float(torch.einsum("phtc,hcd,phtd->", d, moment, d))

    rotated = ordered_feedback(rotate(rotate(moment).mT).mT)
    assert error(rotated) < 0.95 * error(Rounding())
    assert error(rotated) < 0.95 * error(ordered_feedback(moment))
    assert choice.cost > 0


@pytest.mark.parametrize("name", ["nf3", "int2"])
def test_the_range_is_the_one_of_least_error(name: str) -> None:
    """Independent gradients feel the squared error alone, which is least for less than the whole range."""
    generator = torch.Generator().manual_seed(6)
    rows, gradients = (torch.randn(48, 2, 64, 64, generator=generator).bfloat16() for _ in range(2))
    sample = TensorSample(0, "value", rows, gradients, 8)
    (choice,) = fit(Statistics((sample,), (torch.zeros(2, 64, 64),), 100), [name])[0]
    codec = SCHEMES[name].value

    def error(share: float) -> torch.Tensor:
        page = codec.encode(rows.float(), "value", Rounding(clip=torch.full((2,), share)))
        return (codec.decode(page, 64, "value") - rows.float()).square().mean((0, 2, 3))

    errors = {share: error(share) for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)}
    assert choice.rounding.clip is not None
    for head, share in enumerate(choice.rounding.clip.tolist()):
        chosen = errors[round(share, 2)][head]
        assert chosen <= 1.03 * min(e[head] for e in errors.values())
        assert chosen < errors[1.0][head]


def test_the_model_writes_windows(loaded: LoadedModel) -> None:
    windows = write_windows(loaded, 70, 3)
    assert [len(w) for w in windows] == [70] * 3
    assert windows == write_windows(loaded, 70, 3)
    assert len({tuple(w) for w in windows}) == 3
    assert len(set(windows[0])) > 10


@dataclass(frozen=True)
class Option:
    bytes: int
    cost: float


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    source = random.Random(seed)
    rows = [[Option(64 * source.randint(1, 9), source.random()) for _ in range(source.randint(1, 4))] for _ in range(5)]
    for budget in range(64 * 5, 64 * 46, 96):
        fitting = [
            sum(o.cost for o in pick) for pick in itertools.product(*rows) if sum(o.bytes for o in pick) <= budget
        ]
        if not fitting:
            with pytest.raises(ConfigError, match="the least possible is"):
                allocate(rows, budget)
            continue
        chosen = allocate(rows, budget)
        assert sum(row[i].bytes for row, i in zip(rows, chosen, strict=True)) <= budget
        assert total_cost(rows, chosen) == pytest.approx(min(fitting))


def test_cheapest_within_is_tight(table: list[list[FittedCodec]]) -> None:
    most = total_cost(table, allocate(table, sum(row[3].bytes for row in table)))
    budget = cheapest_within(table, most)
    assert total_cost(table, allocate(table, budget)) <= most
    assert total_cost(table, allocate(table, budget - 64)) > most
    with pytest.raises(ConfigError, match="the least possible is"):
        cheapest_within(table, 0.0)


def test_planner_budgets(loaded: LoadedModel, table: list[list[FittedCodec]]) -> None:
    planner = Planner(loaded.geometry, table, "int8")
    for bits in (planner.bits(planner.least), 5.5, 7.0):
        policy = planner.policy(planner.of_bits(bits))
        assert policy.bits_per_element(loaded.geometry) <= bits + 1e-9
    with pytest.raises(ConfigError, match="1 bits per element cannot be met; the least possible is"):
        planner.of_bits(1.0)
    layout = PoolLayout.of(loaded.geometry, planner.policy(planner.least))
    least = 3 * layout.frames_of(300) * layout.frame_bytes
    for memory in (least, 2 * least):
        layout = PoolLayout.of(loaded.geometry, planner.policy(planner.of_memory(memory, 3, 300)))
        assert 3 * layout.frames_of(300) * layout.frame_bytes <= memory
    with pytest.raises(ConfigError, match=f"the least possible is {least} bytes"):
        planner.of_memory(least - 1, 3, 300)


def test_windows_are_disjoint_and_from_every_text() -> None:
    texts = [list(range(1000)), list(range(5000, 6200))]
    fitted, checked = split_windows(texts, 100, 8, 3)
    starts = [w[0] for w in fitted + checked]
    assert len(set(starts)) == 11
    assert {s >= 5000 for s in starts} == {True, False}
    assert all(len(w) == 100 and w[-1] - w[0] == 99 for w in fitted + checked)
    with pytest.raises(ConfigError, match="1000, 1200 tokens: 22 windows of 100"):
        split_windows(texts, 100, 20, 3)
    with pytest.raises(ConfigError, match="0 check windows"):
        split_windows(texts, 100, 20, 0)


# The files


@pytest.fixture
def saved(
    loaded: LoadedModel, statistics: Statistics, table: list[list[FittedCodec]], tmp_path: Path
) -> tuple[Path, Policy]:
    planner = Planner(loaded.geometry, table, "int8")
    policy = planner.policy(planner.of_bits(6.5))
    assert policy.rounding is not None
    fed = LayerRounding(key=ordered_feedback(statistics.queries[0]))
    policy = replace(policy, rounding=(fed, *policy.rounding[1:]))
    return tmp_path, save_policy(tmp_path, policy, loaded.geometry, loaded.fingerprint, {"kl": 0.5})


def test_a_policy_survives_the_disk(loaded: LoadedModel, saved: tuple[Path, Policy]) -> None:
    directory, policy = saved
    again = policy_of(f"policy:{directory}", loaded.geometry, loaded.fingerprint)
    assert again == policy
    assert again.name.startswith("calibrated-")
    assert again.sink == (SCHEMES["int8"],) * 3
    assert again.rounding is not None
    assert policy.rounding is not None
    pairs = list(zip(again.rounding, policy.rounding, strict=True))
    assert pairs[0][0].key.feedback is not None
    for a, b in pairs:
        assert a.value.feedback is None
        assert (a.key.feedback is None) == (b.key.feedback is None)
        if a.key.feedback is not None and b.key.feedback is not None:
            assert torch.equal(a.key.feedback, b.key.feedback)
    assert json.loads((directory / "policy.json").read_text())["measured"] == {"kl": 0.5}
    stored = set(load_file(directory / "rounding.safetensors"))
    assert {f"{i}.key.feedback" for i, (a, _) in enumerate(pairs) if a.key.feedback is not None} <= stored


def test_the_name_follows_whatever_changes_bytes(
    loaded: LoadedModel, saved: tuple[Path, Policy], tmp_path: Path
) -> None:
    _, policy = saved
    plain = save_policy(tmp_path / "b", replace(policy, rounding=None), loaded.geometry, loaded.fingerprint, {})
    deeper = save_policy(tmp_path / "c", replace(policy, sink=None), loaded.geometry, loaded.fingerprint, {})
    assert len({policy.name, plain.name, deeper.name}) == 3
    same = save_policy(tmp_path / "d", policy, loaded.geometry, loaded.fingerprint, {"other": 1})
    assert same.name == policy.name


def test_what_does_not_fit_is_refused(loaded: LoadedModel, saved: tuple[Path, Policy]) -> None:
    directory, _ = saved

    def refused(part: str, geometry: ModelGeometry = loaded.geometry, fingerprint: str = loaded.fingerprint) -> None:
        with pytest.raises(ConfigError, match=part):
            load_policy(directory, geometry, fingerprint)

    refused("was calibrated for tiny .*; this model is tiny \\(abc\\)", fingerprint="abc")
    json_file, tensor_file = directory / "policy.json", directory / "rounding.safetensors"
    document, data = json.loads(json_file.read_text()), tensor_file.read_bytes()

    def with_json(part: str, **changes: object) -> None:
        json_file.write_text(json.dumps(document | changes))
        refused(part)

    with_json("has 2 layers; tiny has 3 layers", layers=document["layers"][:2])
    with_json("unknown KV cache dtype 'int9'", layers=["int9"] * 3)
    with_json("'layers' is no list of dtypes", layers="int4")
    with_json("version 2", version=1)
    with_json("tensors' sha256, is missing", tensors={})
    json_file.write_text(json.dumps({k: v for k, v in document.items() if k != "sink"}))
    refused("has no 'sink'")
    json_file.write_text("[1]")
    refused("holds no JSON object")
    json_file.write_bytes(b"\xff{")
    refused("damaged")
    json_file.write_text(json.dumps(document))
    tensor_file.write_bytes(data[:-1] + b"?")
    refused("SHA-256")
    tensor_file.unlink()
    refused("cannot read the policy file .*rounding")
    json_file.unlink()
    refused("cannot read the policy file .*policy.json")
