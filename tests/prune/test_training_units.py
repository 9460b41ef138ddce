"""Units and pools: the same masks as the patterns make, for every kind of layer."""

import pytest
import torch
from torch import nn

from sparsekit.patterns import Pattern, parse_pattern
from sparsekit.prune.layers import Layer
from sparsekit.prune.training.units import Units, ranks

MODULES = {
    "linear": lambda: nn.Linear(16, 8),
    "cut linear": lambda: nn.Linear(13, 7),
    "conv": lambda: nn.Conv2d(10, 8, 3),
    "grouped conv": lambda: nn.Conv2d(24, 8, (1, 3), groups=2),
    "conv1d": lambda: nn.Conv1d(9, 8, 5),
}
PATTERNS = ["2:4", "1:8", "2:4v4", "bsr4x4@0.5", "bsr2x5@0.75", "bsr1x1@0.9", "bsr4x8@1.0"]


def make(name, pattern):
    torch.manual_seed(0)
    layer = Layer(name, [MODULES[name]()])
    parsed = parse_pattern(pattern)
    return layer, parsed, Units(layer, parsed)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODULES)
def test_the_best_units_are_the_patterns_mask(name, pattern):
    layer, parsed, units = make(name, pattern)
    weight = layer.weight.detach().abs()
    mask = torch.stack([parsed.mask(w) for w in layer.matrices(weight, parsed)])
    assert torch.equal(units.spread(units.keep(units.sums(weight))), layer.from_matrices(mask))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODULES)
def test_sums_and_spread(name, pattern):
    layer, _, units = make(name, pattern)
    values = torch.randint(-8, 8, layer.weight.shape).float()
    assert units.sizes.sum() == values.numel()
    # Number the units and spread the numbers: weights of one number are what is summed.
    number = units.spread(torch.arange(units.sizes.numel()).view(units.sizes.shape))
    sums = torch.zeros(units.sizes.numel()).index_add_(0, number.flatten(), values.flatten())
    assert torch.equal(units.sums(values).flatten(), sums)
    assert torch.equal(units.any(values != 0).flatten(), sums.new_zeros(len(sums)).index_add_(
        0, number.flatten(), (values != 0).float().flatten()) > 0)  # fmt: skip


def test_what_competes():
    _, _, units = make("grouped conv", "2:4v4")
    assert units.sizes.shape == (2 * 1 * 9, 4)  # groups, vectors of 4 rows, 3 taps of 12 channels
    assert (units.kept, units.density) == (2, 0.5)
    _, _, units = make("grouped conv", "bsr2x4@0.75")
    assert units.sizes.shape == (2, 2 * 9)
    assert (units.kept, units.density) == (4, 4 / 18)


@pytest.mark.parametrize("pattern", ["2:4", "1:4v4", "bsr4x4@0.75"])
def test_half_way_the_worst_of_the_doomed_are_gone(pattern):
    _, _, units = make("conv", pattern)
    score = torch.rand(units.sizes.shape)
    end = units.keep(score)
    real = units.sizes > 0
    doomed = sorted(score[real & ~end].tolist())
    for share in (0.0, 0.3, 0.5, 1.0):
        kept = units.keep_partly(score, share)
        gone = score[real & ~kept].tolist()
        assert sorted(gone) == doomed[: round(share * len(doomed))]
        assert not bool((end & ~kept).any())
    assert torch.equal(kept, end)


def test_ranks_of_equals():
    assert ranks(torch.tensor([[1.0, 3, 3, 0], [2, 2, 2, 2]])).tolist() == [
        [2, 0, 1, 3],
        [0, 1, 2, 3],
    ]


def test_a_pattern_of_another_kind_is_refused():
    class Stripes(Pattern):
        sparsity = row_tile = k_tile = cover = mask = first_violation = None

    with pytest.raises(ValueError, match="expected an N:M or block pattern"):
        Units(Layer("0", [nn.Linear(8, 8)]), Stripes())
