"""Rounding a layer's weights so that the products with its inputs change least.

GPTQ (Frantar et al., 2022, arXiv:2210.17323) in the form of LDLQ (Chee et al., 2023, arXiv:2307.13304, which shows the
two to be the same): inputs are taken one after another; each one's weights are moved by what best makes up for the
errors of those before, and rounded. The grid is fitted before, so that inputs can be taken heaviest first, whatever
group they belong to (the activation order that needs no indices in the file).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.calibration.fit import DAMPING
from kvbits.weights.base import GROUP
from kvbits.weights.integers import Integers, fit_grid, joined, round_to_grid

_BLOCK = 64
"""Inputs between two products with all errors so far."""


def round_with_feedback(weight: Tensor, metric: Tensor, bits: int) -> Integers:
    """``weight`` ``float32 [out, in]`` under ``metric`` ``float32 [in, in]``, the sum of ``x x^T`` over the inputs."""
    order = metric.diagonal().argsort(descending=True, stable=True)
    factors = error_factors(metric[order][:, order])
    turned = weight.T.contiguous()
    scale, zero = fit_grid(turned, bits)
    exact, groups = turned[order], order // GROUP
    codes, errors = torch.empty_like(exact), torch.empty_like(exact)
    for first in range(0, len(exact), _BLOCK):
        last = min(first + _BLOCK, len(exact))
        moved = torch.addmm(exact[first:last], factors[:first, first:last].T, errors[:first])
        for i in range(first, last):
            step, base = scale[groups[i]], zero[groups[i]]
            codes[i] = round_to_grid(moved[i - first], step, base, bits)
            errors[i] = exact[i] - (codes[i] - base) * step
            moved[i - first + 1 :] += factors[i, i + 1 : last].unsqueeze(1) * errors[i]
    return joined(codes[order.argsort()], scale, zero, bits)


def error_factors(metric: Tensor, damping: float = DAMPING) -> Tensor:
    """How much of each input's error every later input takes over: ``float32 [in, in]``, strictly upper triangular.

    With ``metric = (U + 1) D (U + 1)^T``, ``U`` strictly upper triangular, the error over the inputs of ``W - Q`` is
    least where input ``k`` is rounded from ``W_k + sum_j (W_j - Q_j) U_jk`` over the inputs ``j`` before it. A share
    ``damping`` of the mean diagonal is added first; a metric of zeros gives no feedback.
    """
    damped = metric.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * mean + (mean == 0))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # of the reversed matrix: lower becomes upper
    return torch.triu(upper / upper.diagonal(), diagonal=1).float()


def output_error(weight: Tensor, rounded: Tensor, metric: Tensor) -> float:
    """Squared error of the products over all inputs; all ``float32 [out, in]`` and ``[in, in]``."""
    apart = weight - rounded
    return float(((apart @ metric) * apart).sum(dtype=torch.float64))
