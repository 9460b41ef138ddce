"""Reconstructions against closed forms and against each other."""

import pytest
import torch

from sparsekit.patterns import NM, BlockSparse, parse_pattern
from sparsekit.prune.methods import METHODS
from sparsekit.prune.reconstruct import (
    RECONSTRUCTIONS,
    ReconstructionOptions,
    keep_values,
    least_squares,
    relative_error,
    sweep,
)
from sparsekit.prune.scores import magnitude, optimal_brain_surgeon, wanda, with_statistic

PATTERNS = [
    "1:4",
    "2:4",
    "4:8",
    "2:4v4",
    "1:4v8",
    "4:8v16",
    "bsr1x1@0.5",
    "bsr16x16@0.75",
    "bsr4x1@0.6",
]
OPTIONS = ReconstructionOptions(solver_block=32)


def problem(n=32, k=96, dtype=torch.float64, seed=0):
    """A weight and the second moment of strongly correlated inputs."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=make, dtype=dtype)
    mix = torch.randn(k // 4, k, generator=make, dtype=dtype)
    x = torch.randn(500, k // 4, generator=make, dtype=dtype) @ mix
    x += 0.3 * torch.randn(500, k, generator=make, dtype=dtype)
    return weight, x.t() @ x / len(x)


@pytest.mark.parametrize("spelling", PATTERNS)
@pytest.mark.parametrize("name", RECONSTRUCTIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(32, 96), (19, 45)])
def test_result_is_zero_outside_a_mask_that_fits(spelling, name, method, shape):
    pattern = parse_pattern(spelling)
    weight, moment = problem(*shape)
    before = weight.clone(), moment.clone()
    score = with_statistic(METHODS[method].score, 0.1 + weight.flip(0).abs())
    pruned, mask = RECONSTRUCTIONS[name](weight, pattern, score, moment, OPTIONS)
    assert pattern.first_violation(mask) is None
    assert torch.equal(pruned != 0, mask)  # continuous random values: no kept one is zero
    # Not merely fitting: it keeps as much as a mask of the whole matrix does.
    assert int(mask.sum()) == int(pattern.mask(weight.abs()).sum()) or isinstance(
        pattern, BlockSparse
    )
    if isinstance(pattern, BlockSparse):
        assert int(pattern.occupancy(mask).sum()) == pattern.blocks_kept(*shape)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


@pytest.mark.parametrize("spelling", PATTERNS)
def test_each_step_of_knowledge_lowers_the_error(spelling):
    pattern = parse_pattern(spelling)
    weight, moment = problem()

    def error(solve, score):
        return relative_error(weight, solve(weight, pattern, score, moment, OPTIONS)[0], moment)

    swept = error(sweep, optimal_brain_surgeon)
    assert error(least_squares, optimal_brain_surgeon) < swept
    assert swept < error(keep_values, wanda)
    assert swept < error(keep_values, magnitude)


def test_wanda_beats_magnitude_when_inputs_differ_in_scale():
    weight, moment = problem()
    scale = torch.logspace(-1, 1, weight.shape[1], dtype=weight.dtype)
    scale = scale[torch.randperm(len(scale), generator=torch.Generator().manual_seed(1))]
    moment = moment * scale * scale[:, None]
    lost = {
        score: relative_error(
            weight, keep_values(weight, NM(2, 4), score, moment, OPTIONS)[0], moment
        )
        for score in (wanda, magnitude)
    }
    assert lost[wanda] < lost[magnitude]


def test_sweep_equals_the_closed_form_when_all_free_columns_come_later():
    # Columns 0 and 1 are dropped, so 2 and 3 take up all of their loss: plain least squares.
    weight, moment = problem(n=4, k=4)

    def later_is_better(values, columns):
        return torch.arange(4, dtype=values.dtype).expand_as(values)

    options = ReconstructionOptions(solver_block=4, dampening=1e-12)
    pruned, mask = sweep(weight, NM(2, 4), later_is_better, moment, options)
    assert mask.tolist() == [[False, False, True, True]] * 4
    expected = weight @ moment[:, 2:] @ torch.linalg.inv(moment[2:, 2:])
    torch.testing.assert_close(pruned[:, 2:], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spelling", ["2:4", "2:4v4", "bsr4x4@0.5"])
def test_least_squares_solves_each_rows_normal_equations(spelling):
    weight, moment = problem(n=8, k=16)
    options = ReconstructionOptions(dampening=1e-10)
    pruned, mask = least_squares(
        weight, parse_pattern(spelling), optimal_brain_surgeon, moment, options
    )
    for row in range(8):
        kept = mask[row].nonzero().flatten()
        expected = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight[row])
        torch.testing.assert_close(pruned[row, kept], expected, rtol=1e-6, atol=1e-8)


def test_sweep_does_not_depend_on_the_solver_block_for_groups():
    weight, moment = problem()
    results = [
        sweep(weight, NM(2, 4), optimal_brain_surgeon, moment, ReconstructionOptions(block))
        for block in (4, 7, 128)
    ]
    for pruned, mask in results[1:]:
        assert torch.equal(mask, results[0][1])
        torch.testing.assert_close(pruned, results[0][0], rtol=1e-9, atol=1e-12)


def test_uncorrelated_inputs_leave_nothing_to_correct():
    weight, _ = problem()
    moment = torch.eye(weight.shape[1], dtype=weight.dtype)
    pruned, mask = sweep(weight, NM(2, 4), magnitude, moment, OPTIONS)
    assert torch.equal(mask, NM(2, 4).mask(weight.abs()))
    assert torch.equal(pruned, weight.masked_fill(~mask, 0))


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_inputs_that_are_always_zero_do_no_harm(name):
    weight, moment = problem()
    moment[5] = moment[:, 5] = 0
    for given in (moment, torch.zeros_like(moment)):
        pruned, mask = RECONSTRUCTIONS[name](weight, NM(2, 4), wanda, given, OPTIONS)
        assert pruned.isfinite().all()
        assert NM(2, 4).fits(mask)


def test_relative_error_is_that_of_the_outputs():
    make = torch.Generator().manual_seed(3)
    x, dense, pruned = (
        torch.randn(size, generator=make, dtype=torch.float64) for size in [(50, 6), (4, 6), (4, 6)]
    )
    outputs = ((dense - pruned) @ x.t()).norm() / (dense @ x.t()).norm()
    assert relative_error(dense, pruned, x.t() @ x / 50) == pytest.approx(float(outputs))
    assert relative_error(dense, dense, x.t() @ x) == 0.0


@pytest.mark.parametrize(
    "bad", [{"solver_block": 0}, {"dampening": 0.0}, {"dampening": float("nan")}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ReconstructionOptions(**bad)
