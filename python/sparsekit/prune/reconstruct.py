"""Reconstruction: choose the mask and give the kept weights the values that fit it best.

Each function takes `(weight [n, k], pattern, score, moment [k, k] or None, options)` and returns
`(weight, mask)` with exact zeros outside the mask. All arithmetic is in the moment's dtype.
`reconstruct` applies one of them to a layer of any number of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.patterns import BlockSparse, Pattern
from sparsekit.prune.admm import admm
from sparsekit.prune.moments import ReconstructionOptions, damped, known_columns
from sparsekit.prune.scores import Columns, Score, with_statistic

__all__ = [
    "RECONSTRUCTIONS",
    "Reconstruction",
    "ReconstructionOptions",
    "keep_values",
    "least_squares",
    "reconstruct",
    "relative_error",
    "sweep",
]


def keep_values(
    weight: Tensor,
    pattern: Pattern,
    score: Score,
    moment: Tensor | None,
    options: ReconstructionOptions,
) -> tuple[Tensor, Tensor]:
    """Zero what the mask drops and leave the rest as it is."""
    columns = None if moment is None else known_columns(moment, options)
    mask = pattern.mask(score(weight, columns))
    return weight.masked_fill(~mask, 0), mask


def sweep(
    weight: Tensor,
    pattern: Pattern,
    score: Score,
    moment: Tensor | None,
    options: ReconstructionOptions,
) -> tuple[Tensor, Tensor]:
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1), for every pattern.

    Goes through the columns from left to right. What zeroing a column loses is made up for by the
    columns on its right, in the least-squares sense. The mask of a stripe of columns is chosen
    when the sweep reaches it, from weights that already carry the updates: a stripe is one group
    of M columns for N:M, and `solver_block` columns for blocks. How many blocks a stripe keeps is
    decided beforehand by scoring the whole matrix, because blocks compete across all columns.
    """
    assert moment is not None
    rows, columns = weight.shape
    weight = weight.clone()
    dead = moment.diagonal() == 0
    weight[:, dead] = 0  # An input that is always zero needs no weight.
    root = _inverse_root(moment, options)
    known = Columns(moment.diagonal().sqrt(), lambda: root.diagonal().square())
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    stripes = {
        start: (stop, part)
        for start, stop, part in _stripes(weight, pattern, score, moment, options)
    }
    block = -(-options.solver_block // pattern.k_tile) * pattern.k_tile
    for start in range(0, columns, block):
        stop = min(columns, start + block)
        # Each column of the weight lies in one piece here: it is what every step works on.
        values = weight[:, start:stop].t().contiguous()
        chosen = torch.empty_like(values, dtype=torch.bool)
        errors = torch.empty_like(values)
        local = root[start:stop, start:stop]
        for j in range(stop - start):
            if start + j in stripes:
                end, part = stripes[start + j]
                view = known.slice(start + j, end)
                stripe = slice(j, end - start)
                chosen[stripe] = part.mask(score(values[stripe].t(), view)).t()
            kept = values[j].masked_fill(~chosen[j], 0)
            torch.div(values[j] - kept, local[j, j], out=errors[j])
            values[j] = kept
            values[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        mask[:, start:stop] = chosen.t()
        weight[:, start:stop] = values.t()
        weight[:, stop:].addmm_(errors.t(), root[start:stop, stop:], alpha=-1)
    return weight, mask


def least_squares(
    weight: Tensor,
    pattern: Pattern,
    score: Score,
    moment: Tensor | None,
    options: ReconstructionOptions,
) -> tuple[Tensor, Tensor]:
    """The sweep's mask with the exact optimum of the kept values.

    The sweep lets a column be corrected only by columns on its right. Here every row of a mask
    gets the solution of its own normal equations: one solve of about k/2 unknowns per row, so
    n·k³/24 multiplications for 2:4 (vectors and blocks share theirs).
    """
    assert moment is not None
    _, mask = sweep(weight, pattern, score, moment, options)
    moments = damped(moment, options)
    target = weight @ moments
    out = torch.zeros_like(weight)
    patterns, rows_of = mask.unique(dim=0, return_inverse=True)

    def solve(index: int) -> None:
        rows = (rows_of == index).nonzero().flatten()
        kept = patterns[index].nonzero().flatten()
        if len(kept):
            factor = torch.linalg.cholesky(moments[kept][:, kept])
            solved = torch.cholesky_solve(target[rows][:, kept].t(), factor).t()
            out[rows[:, None], kept] = solved

    # Many small factorisations: one on each thread is faster than each one on all of them.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(solve, range(len(patterns))))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is the default of new threads
    return out, mask


Reconstruction = Callable[
    [Tensor, Pattern, Score, "Tensor | None", ReconstructionOptions], tuple[Tensor, Tensor]
]

RECONSTRUCTIONS: dict[str, Reconstruction] = {
    "none": keep_values,
    "sweep": sweep,
    "least_squares": least_squares,
    "admm": admm,
}
"""Every reconstruction by name. All but "none" need calibration."""


def reconstruct(
    solve: Reconstruction,
    weights: Tensor,
    pattern: Pattern,
    score: Score,
    moments: Tensor | None,
    options: ReconstructionOptions,
    statistic: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve every group of a layer with the statistics of its own inputs.

    Args:
        solve: a function of `RECONSTRUCTIONS`.
        weights: `[groups, n, k]`.
        pattern: what the groups' rows, one below the other, shall follow.
        score: ranks the weights.
        moments: `[groups, k, k]`, or None without calibration.
        options: settings.
        statistic: `[groups, n, k]`, where the score reads one.

    Returns:
        Weights and mask, both `[groups, n, k]`.
    """
    given: Sequence[Tensor | None] = [None] * len(weights) if moments is None else list(moments)
    scores = bind(score, statistic, len(weights))
    shares = _shares(weights, pattern, scores, given, options)
    solved = [
        solve(weight, share, mine, moment, options)
        for weight, share, mine, moment in zip(weights, shares, scores, given, strict=True)
    ]
    return torch.stack([weight for weight, _ in solved]), torch.stack([mask for _, mask in solved])


def _shares(
    weights: Tensor,
    pattern: Pattern,
    scores: Sequence[Score],
    moments: Sequence[Tensor | None],
    options: ReconstructionOptions,
) -> list[Pattern]:
    """The pattern inside each group. How many blocks a group keeps all groups decide together."""
    if len(weights) == 1 or not isinstance(pattern, BlockSparse):
        return [pattern] * len(weights)
    ranks = score_groups(weights, scores, moments, options)
    kept = pattern.occupancy(pattern.mask(ranks.flatten(0, 1))).view(len(weights), -1)
    return [replace(pattern, sparsity=1.0 - int(part.sum()) / part.numel()) for part in kept]


def score_groups(
    weights: Tensor,
    scores: Iterable[Score],
    moments: Iterable[Tensor | None],
    options: ReconstructionOptions,
) -> Tensor:
    """The score `[groups, n, k]` of a layer, each group with the statistics of its own inputs."""
    return torch.stack(
        [
            score(weight, None if moment is None else known_columns(moment, options))
            for weight, score, moment in zip(weights, scores, moments, strict=True)
        ]
    )


def bind(score: Score, statistic: Tensor | None, groups: int) -> list[Score]:
    """The score of each group, with its part of a statistic `[groups, n, k]`."""
    if statistic is None:
        return [score] * groups
    return [with_statistic(score, part) for part in statistic]


def relative_error(dense: Tensor, pruned: Tensor, moment: Tensor) -> float:
    """‖(W - W')X‖ / ‖WX‖ over the calibration inputs, from their second moment.

    Weights `[n, k]` with a moment `[k, k]`, or both with one more leading dimension of groups.
    """
    change = dense - pruned
    lost = ((change @ moment) * change).sum().clamp(min=0)
    total = ((dense @ moment) * dense).sum()
    return float((lost / total).sqrt()) if total > 0 else 0.0


def _stripes(
    weight: Tensor, pattern: Pattern, score: Score, moment: Tensor, options: ReconstructionOptions
) -> Iterator[tuple[int, int, Pattern]]:
    """(first column, end, pattern inside) of the stripes whose masks are chosen one by one."""
    columns = weight.shape[1]
    if not isinstance(pattern, BlockSparse):
        for start in range(0, columns, pattern.k_tile):
            yield start, min(columns, start + pattern.k_tile), pattern
        return
    kept = pattern.occupancy(pattern.mask(score(weight, known_columns(moment, options))))
    across = max(1, -(-options.solver_block // pattern.k_tile))
    for first in range(0, kept.shape[1], across):
        part = kept[:, first : first + across]
        share = replace(pattern, sparsity=1.0 - int(part.sum()) / part.numel())
        start = first * pattern.k_tile
        yield start, min(columns, start + across * pattern.k_tile), share


def _inverse_root(moment: Tensor, options: ReconstructionOptions) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moment."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment, options)))
    return torch.linalg.cholesky(inverse, upper=True)
