"""Reconstruction by ADMM: mask and values of all rows together, in matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.patterns import Pattern
from sparsekit.prune.moments import ReconstructionOptions, damped, known_columns
from sparsekit.prune.scores import Score

# Chosen on the layers of bench/reconstructions.py. A penalty that ends below 2 leaves the mask of
# blocks undecided; growing it in smaller steps lowers the error by 1 % and takes twice as long.
_PENALTIES = tuple(0.1 * 1.6**stage for stage in range(8))
_ITERATIONS = 3
_CONJUGATE_STEPS = 10


def admm(
    weight: Tensor,
    pattern: Pattern,
    score: Score,
    moment: Tensor | None,
    options: ReconstructionOptions,
) -> tuple[Tensor, Tensor]:
    """ADMM with a growing penalty, then conjugate gradients (ALPS).

    Two copies of the weight pull at each other: one fits the outputs, the other fits the pattern,
    and what they disagree about is added up and fed back. The penalty on disagreement grows, so
    that the mask is free to change at first and settles at the end. The kept values are then
    polished by conjugate gradients on all rows at once. Columns are scaled by their inputs' norms
    before, which makes Wanda's score the exact projection onto the pattern; other scores are
    followed as they are. Meng et al. 2024, arXiv 2406.07831; scaling as in Boža 2024,
    arXiv 2401.02938.

    Needs calibration. Costs 8 factorisations of `[k, k]` and 36 products of `[n, k]` by `[k, k]`,
    whatever the pattern is.
    """
    assert moment is not None
    moments = damped(moment, options)
    scale = moments.diagonal().sqrt()
    moments = moments / scale / scale[:, None]
    known = known_columns(moment, options)
    dense = weight * scale
    target = dense @ moments

    fitting, owed = dense, torch.zeros_like(dense)
    # What is owed stays as it is when the penalty grows. Plain ADMM would scale it down; that
    # measured no better.
    for penalty in _PENALTIES:
        inverse = _inverse(moments, penalty)
        for _ in range(_ITERATIONS):
            wanted = fitting + owed
            mask = pattern.mask(score(wanted / scale, known))
            sparse = wanted.masked_fill(~mask, 0)
            owed = wanted - sparse
            fitting = (target + penalty * (sparse - owed)) @ inverse
    wanted = fitting + owed
    mask = pattern.mask(score(wanted / scale, known))
    return _polish(wanted.masked_fill(~mask, 0), mask, target, moments) / scale, mask


def _inverse(moments: Tensor, penalty: float) -> Tensor:
    regular = moments.clone()
    regular.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))


def _polish(values: Tensor, mask: Tensor, target: Tensor, moments: Tensor) -> Tensor:
    """Conjugate gradients on each row's normal equations, restricted to what its mask keeps.

    The scaled moments have a diagonal of ones: Jacobi's preconditioner is built in.
    """
    drop = ~mask
    residual = (target - values @ moments).masked_fill(drop, 0)
    direction = residual
    size = residual.square().sum(1, keepdim=True)
    smallest = torch.finfo(values.dtype).tiny
    for _ in range(_CONJUGATE_STEPS):
        moved = (direction @ moments).masked_fill(drop, 0)
        # A row that is solved has no residual left: its step is 0 / tiny.
        step = size / (direction * moved).sum(1, keepdim=True).clamp(min=smallest)
        values = values + step * direction
        residual = residual - step * moved
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp(min=smallest) * direction
    return values
