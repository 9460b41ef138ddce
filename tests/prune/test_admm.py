"""ADMM against an exhaustive search, against the other reconstructions and on degenerate inputs."""

import itertools

import pytest
import torch

from sparsekit.patterns import NM, BlockSparse, parse_pattern
from sparsekit.prune.admm import _polish, admm
from sparsekit.prune.reconstruct import (
    ReconstructionOptions,
    least_squares,
    relative_error,
    sweep,
)
from sparsekit.prune.scores import optimal_brain_surgeon, wanda

OPTIONS = ReconstructionOptions(dampening=1e-6)


def problem(n=24, k=64, tokens=300, dtype=torch.float64, seed=0):
    """A weight and the second moment of strongly correlated inputs of very different sizes."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=make, dtype=dtype)
    mix = torch.randn(k // 4, k, generator=make, dtype=dtype)
    x = torch.randn(tokens, k // 4, generator=make, dtype=dtype) @ mix
    x += 0.3 * torch.randn(tokens, k, generator=make, dtype=dtype)
    x *= torch.logspace(-1, 1, k, dtype=dtype)[torch.randperm(k, generator=make)]
    return weight, x.t() @ x / tokens


def best_error(weight, pattern, moment):
    """Of every mask of one row with its exact least-squares values: nothing can be better."""
    k = weight.shape[1]
    groups = [
        itertools.combinations(range(start, start + pattern.m), pattern.n)
        for start in range(0, k, pattern.m)
    ]
    best = float("inf")
    for choice in itertools.product(*map(list, groups)):
        kept = [column for group in choice for column in group]
        values = torch.zeros_like(weight)
        values[:, kept] = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight[0])
        best = min(best, relative_error(weight, values, moment))
    return best


def test_close_to_the_best_of_all_masks():
    ratios = []
    for seed in range(6):
        weight, moment = problem(n=1, k=16, seed=seed)
        pruned, _ = admm(weight, NM(2, 4), wanda, moment, OPTIONS)
        best = best_error(weight, NM(2, 4), moment)
        ratios.append(relative_error(weight, pruned, moment) / best)
    assert min(ratios) > 1 - 1e-9  # The search is exhaustive.
    assert sum(ratios) / len(ratios) < 1.1


@pytest.mark.parametrize("spelling", ["2:4", "2:4v4", "1:4", "bsr4x4@0.5", "bsr1x1@0.75"])
def test_better_than_the_sweep_and_its_least_squares(spelling):
    pattern = parse_pattern(spelling)
    weight, moment = problem()

    def error(solve, score):
        pruned, mask = solve(weight, pattern, score, moment, OPTIONS)
        assert pattern.fits(mask)
        assert not pruned[~mask].any()
        return relative_error(weight, pruned, moment)

    # The mask is better, not the values alone: both of these have values that fit their mask.
    assert error(admm, wanda) < 0.97 * error(least_squares, optimal_brain_surgeon)
    assert error(admm, wanda) < 0.9 * error(sweep, optimal_brain_surgeon)


def test_the_polish_solves_the_normal_equations():
    # As many steps as there are kept values solve them exactly.
    weight, moment = problem(n=5, k=16)
    moment = moment / moment.diagonal().sqrt() / moment.diagonal().sqrt()[:, None]
    mask = NM(2, 4).mask(weight.abs())
    solved = _polish(weight.masked_fill(~mask, 0), mask, weight @ moment, moment)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        expected = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight[row])
        torch.testing.assert_close(solved[row, kept], expected, rtol=1e-5, atol=1e-7)


def test_the_polish_leaves_a_solution_alone():
    weight, moment = problem(n=3, k=16)
    everything = torch.ones_like(weight, dtype=torch.bool)
    solved = _polish(weight, everything, weight @ moment, moment)
    torch.testing.assert_close(solved, weight, rtol=1e-9, atol=1e-12)


def test_uncorrelated_inputs_are_the_price_of_the_search():
    # The best mask is the one of the largest weights, and there is nothing to correct.
    weight, _ = problem()
    moment = torch.eye(weight.shape[1], dtype=weight.dtype)
    pruned, mask = admm(weight, NM(2, 4), wanda, moment, OPTIONS)
    torch.testing.assert_close(pruned, weight.masked_fill(~mask, 0))
    best = weight.masked_fill(~NM(2, 4).mask(weight.abs()), 0)
    ratio = relative_error(weight, pruned, moment) / relative_error(weight, best, moment)
    assert 1.0 <= ratio < 1.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spelling", ["2:4", "bsr4x4@0.5"])
def test_fewer_tokens_than_columns(spelling, dtype):
    # The moment has no inverse, and inputs 3 and 9 never fire.
    weight, moment = problem(tokens=10, dtype=dtype)
    for dead in (3, 9):
        moment[dead] = moment[:, dead] = 0
    pruned, mask = admm(weight, parse_pattern(spelling), wanda, moment, ReconstructionOptions())
    assert pruned.dtype == dtype
    assert bool(pruned.isfinite().all())
    if spelling == "2:4":  # Inputs that say nothing go first.
        assert not mask[:, [3, 9]].any()
    # 10 tokens leave so much freedom that half of the weights is enough.
    assert relative_error(weight, pruned, moment) < 0.3
    again, same = admm(weight, parse_pattern(spelling), wanda, moment, ReconstructionOptions())
    assert torch.equal(pruned, again)
    assert torch.equal(mask, same)


def test_the_size_of_inputs_and_weights_does_not_matter():
    weight, moment = problem()
    pruned, mask = admm(weight, NM(2, 4), wanda, moment, OPTIONS)
    scaled, same = admm(weight * 4, NM(2, 4), wanda, moment / 1024, OPTIONS)
    assert torch.equal(mask, same)
    torch.testing.assert_close(scaled, pruned * 4)


def test_all_inputs_zero():
    weight, moment = problem()
    pattern = BlockSparse((4, 4), 0.5)
    pruned, mask = admm(weight, pattern, wanda, torch.zeros_like(moment), OPTIONS)
    assert pattern.fits(mask)
    # Nothing is known of these inputs, so nothing is corrected.
    torch.testing.assert_close(pruned, weight.masked_fill(~mask, 0))
