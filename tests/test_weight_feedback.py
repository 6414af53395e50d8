"""Weights rounded with error feedback, against the definition of GPTQ's steps, and what they cost on their inputs."""

from __future__ import annotations

import pytest
import torch
from helpers.carried_files import Form, of_compressed, rounded, values
from torch import Tensor

from kvbits.calibration.weight_feedback import output_error, round_with_feedback
from kvbits.weights.integers import fit_grid, nearest

DAMPING = 0.01


def inputs_of(count: int, rows: int, seed: int) -> Tensor:
    """Inputs that depend on each other, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, count // 2, generator=generator) @ torch.randn(count // 2, count, generator=generator)
    scales = torch.rand(count, generator=generator).square() * 4 + 0.05
    return (mixed / count**0.5 + 0.1 * torch.randn(rows, count, generator=generator)) * scales


def weight_of(out: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(out, count, generator=torch.Generator().manual_seed(seed)) / count**0.5


def by_definition(weight: Tensor, metric: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes: one input after another, heaviest first, is rounded where it is best, given the errors that are made
    already and that all later inputs may still move freely: a least-squares problem, solved anew for each."""
    size, order = metric.shape[0], metric.diagonal().argsort(descending=True, stable=True).tolist()
    wide = metric.double() + DAMPING * metric.diagonal().double().mean() * torch.eye(size, dtype=torch.float64)
    errors, codes = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(weight)
    for k, column in enumerate(order):
        past, free = order[:k], order[k:]
        # minimum over the free errors of the squared error of the product
        best = -torch.linalg.solve(wide[free][:, free], wide[free][:, past] @ errors[:, past].T).T
        target = weight[:, column].double() - best[:, 0]
        scale, zero = scales[:, column // 32].double(), zeros[:, column // 32].double()
        codes[:, column] = (target / scale + zero).round().clamp(0, 2**bits - 1).float()
        errors[:, column] = weight[:, column].double() - (codes[:, column].double() - zero) * scale
    return codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("count", "seed"), [(32, 1), (96, 2), (160, 3)])
def test_every_code_is_that_of_the_definition(bits: int, count: int, seed: int) -> None:
    weight, x = weight_of(24, count, seed), inputs_of(count, 300, seed)
    metric = x.T @ x
    got = round_with_feedback(weight, metric, bits)
    expected = by_definition(weight, metric, got.scales, got.zeros, bits)
    assert (got.codes.float() != expected).float().mean() < (0.001 if bits == 4 else 0.01)  # near ties, in float32
    assert (nearest(weight, bits).codes.float() != expected).float().mean() > 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_change_less_than_by_rounding_to_nearest(bits: int) -> None:
    weight, x = weight_of(64, 128), inputs_of(128, 500, 4)
    ours, plain = (
        (x.double() @ (weight - found.values()).double().T).square().sum()
        for found in (round_with_feedback(weight, x.T @ x, bits), nearest(weight, bits))
    )
    assert ours < 0.6 * plain
    assert output_error(weight, nearest(weight, bits).values(), x.T @ x) == pytest.approx(float(plain), rel=1e-3)


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weight = weight_of(16, 64)
    for metric in (torch.eye(64) * 3, torch.diag(torch.arange(1.0, 65)), torch.zeros(64, 64)):
        assert torch.equal(round_with_feedback(weight, metric, 4).codes, nearest(weight, 4).codes)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = weight_of(16, 64), inputs_of(64, 200, 5)
    x[:, 10:30] = 0
    found = round_with_feedback(weight, x.T @ x, 4).values()
    assert found.isfinite().all()
    assert (found - weight)[:, 10:30].abs().max() < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_is_no_worse_than_the_whole_range(bits: int) -> None:
    weight = weight_of(32, 256)
    form = Form(lambda *_: {}, of_compressed(bits, False), bits=bits, symmetric=False, scales=torch.bfloat16)
    plain = (values(*rounded(weight, form)) - weight).square().sum()
    assert (nearest(weight, bits).values() - weight).square().sum() <= plain * 1.001


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 32),
        torch.full((2, 32), 3.5),
        torch.full((2, 32), -1e-9),
        torch.cat([torch.full((2, 31), 1e-6), torch.ones(2, 1)], dim=1),
        torch.linspace(-1e-5, 1e-5, 64).reshape(2, 32),
        torch.linspace(-3e4, 6e4, 64).reshape(2, 32),
    ],
)
def test_groups_of_any_size(weight: Tensor) -> None:
    """Scales are the same numbers for readers of bfloat16 and of float16, and no value is further off than a step."""
    found = nearest(weight, 4)
    assert torch.equal(found.scales.half().float(), found.scales.float())
    assert (found.scales > 0).all()
    step = (weight.amax(1) - weight.amin(1)).clamp(min=weight.abs().amax(1)) / 15
    assert ((found.values() - weight).abs().amax(1) <= step * 2.5 + 6e-8).all()


def test_codes_can_mean_zero() -> None:
    scale, zero = fit_grid(weight_of(8, 64).abs().T.contiguous() + 1, 4)
    assert torch.equal(zero, torch.zeros_like(zero))
    assert scale.shape == (2, 8)
