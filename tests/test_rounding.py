"""Calibrated rounding: its purpose, its edges, and the same bytes from every kernel."""

from __future__ import annotations

import pytest
import torch
from helpers.attention import PLAIN, make_inputs
from helpers.rounding import DTYPES, pages, rounding_of, skewed_metric

from kvbits.calibration.fit import feedback_of, ordered_feedback
from kvbits.codecs import SCHEMES, LayerRounding, Rounding
from kvbits.config import LayerGeometry
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.kernels.reference import ReferenceBackend


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_kernels_and_reference_write_the_same_bytes(dtype: str, isa: str, clip: float | None) -> None:
    for layer in (PLAIN, LayerGeometry(2, 2, 96, 64, 0.1)):
        inputs = make_inputs(layer, [200])
        rounding = rounding_of(layer, clip)
        expected = pages(ReferenceBackend(), layer, dtype, inputs, rounding)
        assert torch.equal(pages(CpuBackend(isa), layer, dtype, inputs, rounding), expected)
        plain = pages(ReferenceBackend(), layer, dtype, inputs, LayerRounding())
        assert not torch.equal(plain, expected)


@pytest.mark.parametrize("isa", available_isas())
def test_a_calibrated_order_chooses_the_wider_channels(isa: str) -> None:
    inputs = make_inputs(PLAIN, [200])
    rounding = rounding_of(PLAIN, 0.7)
    expected = pages(ReferenceBackend(), PLAIN, "mix8_2", inputs, rounding)
    assert torch.equal(pages(CpuBackend(isa), PLAIN, "mix8_2", inputs, rounding), expected)
    assert rounding.key.order is not None
    assert torch.equal(expected[0, :64].int(), rounding.key.order[0])
    assert not torch.equal(pages(ReferenceBackend(), PLAIN, "mix8_2", inputs, LayerRounding()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feedback_lowers_the_error_that_the_metric_measures(dtype: str) -> None:
    metric = skewed_metric(2, 64)
    rows = make_inputs(PLAIN, [64 * 8]).key[0].unflatten(0, (8, 64)).transpose(1, 2).bfloat16().float()
    codec = SCHEMES[dtype].key
    basis = codec.to_basis(torch.eye(64))
    assert torch.allclose(basis.T @ basis, torch.eye(64), atol=1e-6)
    coded = basis.T @ metric @ basis

    def loss(rounding: Rounding | None) -> float:
        error = codec.decode(codec.encode(rows, "key", rounding), 64, "key") - rows
        return float(torch.einsum("phtc,hcd,phtd->", error, metric, error))

    assert loss(Rounding(feedback_of(coded))) < 0.6 * loss(None)
    assert loss(ordered_feedback(coded)) < 0.6 * loss(None)


def test_a_diagonal_metric_gives_no_feedback() -> None:
    metric = torch.diag(torch.arange(1.0, 17.0)).expand(2, 16, 16)
    assert not feedback_of(metric, damping=0.0).any()
    assert not feedback_of(torch.zeros(1, 16, 16)).any()


def test_feedback_is_the_best_completion() -> None:
    """With channel 0 off by 1 and all others free and exact, they must move to the minimum of the quadratic form."""
    metric = skewed_metric(1, 16)[0].double()
    factors = feedback_of(metric[None], damping=0.0)[0].double()
    best = -torch.linalg.solve(metric[1:, 1:], metric[1:, 0])  # minimizes e^T H e over the others when e[0] = 1
    torch.testing.assert_close(factors[0, 1:], best, rtol=1e-3, atol=1e-3)


def test_order_is_followed() -> None:
    """Permuted channels under a permuted metric: the same codes, permuted."""
    metric = skewed_metric(2, 32)
    rows = torch.randn(3, 2, 64, 32, generator=torch.Generator().manual_seed(3))
    rounding = ordered_feedback(metric)
    assert rounding.order is not None
    order = rounding.order.long()
    codec = SCHEMES["int3"].key
    got = codec.decode(codec.encode(rows, "key", rounding), 32, "key")
    index = order[None, :, None].expand_as(rows)
    permuted = rows.gather(-1, index)
    expected = codec.decode(codec.encode(permuted, "key", Rounding(rounding.feedback)), 32, "key")
    assert torch.equal(got.gather(-1, index), expected)
    diagonal = metric.diagonal(dim1=-2, dim2=-1).gather(-1, order)
    assert (diagonal.diff(dim=-1) <= 0).all()


def test_clip_of_one_changes_nothing_and_less_narrows_the_range() -> None:
    rows = torch.randn(3, 2, 64, 32, generator=torch.Generator().manual_seed(3))
    codec = SCHEMES["int2"].value
    plain = codec.encode(rows, "value")
    assert torch.equal(codec.encode(rows, "value", Rounding(clip=torch.ones(2))), plain)
    narrow = codec.decode(codec.encode(rows, "value", Rounding(clip=torch.tensor([1.0, 0.5]))), 32, "value")
    wide = codec.decode(plain, 32, "value")
    assert torch.equal(narrow[:, 0], wide[:, 0])
    ratio = (narrow[:, 1].amax(-1) - narrow[:, 1].amin(-1)) / (wide[:, 1].amax(-1) - wide[:, 1].amin(-1))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), rtol=0.01, atol=0.0)


def test_a_page_with_one_wild_value_stays_finite() -> None:
    inputs = make_inputs(PLAIN, [64])
    inputs.key[0][5, 0, 3] = 3e38
    rounding = rounding_of(PLAIN, 0.7)
    for dtype in DTYPES:
        expected = pages(ReferenceBackend(), PLAIN, dtype, inputs, rounding)
        assert torch.equal(pages(CpuBackend(), PLAIN, dtype, inputs, rounding), expected)
