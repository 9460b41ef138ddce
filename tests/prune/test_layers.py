"""Weights as matrices: what a pattern sees of a convolution."""

import pytest
import torch
from torch import nn

from sparsekit.filters import to_matrix
from sparsekit.patterns import NM, parse_pattern
from sparsekit.prune.layers import Layer

CONVOLUTIONS = {
    "3x3": nn.Conv2d(12, 8, 3),
    "padded taps": nn.Conv2d(10, 8, (3, 2)),
    "1x1": nn.Conv2d(10, 8, 1),
    "grouped": nn.Conv2d(20, 8, 3, groups=2),
    "1d": nn.Conv1d(10, 8, 5),
}


@pytest.mark.parametrize("spelling", ["2:4", "4:8", "bsr4x4@0.5", "bsr2x16@0.5"])
@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_columns_are_channels_within_taps(conv, spelling):
    layer, pattern = Layer("conv", [conv]), parse_pattern(spelling)
    weight = conv.weight.detach()
    matrices = layer.matrices(weight, pattern)
    assert torch.equal(layer.from_matrices(matrices), weight)
    assert matrices.shape[:2] == (conv.groups, 8 // conv.groups)
    flat = weight.flatten(2)
    taps = matrices.reshape(8, flat.shape[2], -1)
    assert flat.shape[2] == 1 or taps.shape[2] % pattern.k_tile == 0
    for tap in range(flat.shape[2]):
        assert torch.equal(taps[:, tap, : flat.shape[1]], flat[:, :, tap])
        assert not taps[:, tap, flat.shape[1] :].any()


@pytest.mark.parametrize("spelling", ["2:4", "4:8", "2:4v4", "bsr4x4@0.5", "bsr2x16@0.5"])
@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_mask_that_fits_these_matrices_fits_the_stored_one(conv, spelling):
    # The stored taps are wider: whole tiles of zeros come after the last one here.
    layer, pattern = Layer("conv", [conv]), parse_pattern(spelling)
    matrices = layer.matrices(conv.weight.detach().abs(), pattern)
    mask = layer.from_matrices(pattern.mask(matrices.flatten(0, 1)))
    assert pattern.first_violation(to_matrix(mask, pattern)) is None
    if isinstance(pattern, NM):
        stored = pattern.mask(to_matrix(conv.weight.detach().abs(), pattern))
        assert torch.equal(to_matrix(mask, pattern), stored & to_matrix(mask, pattern))
        assert int(mask.sum()) == int((stored & (to_matrix(conv.weight, pattern) != 0)).sum())


def test_a_linear_layer_is_its_own_matrix():
    linear = nn.Linear(10, 6)
    layer, weight = Layer("linear", [linear]), linear.weight.detach()
    assert torch.equal(layer.matrices(weight, NM(4, 8)), weight[None])
    assert torch.equal(layer.from_matrices(weight[None]), weight)
    moments = torch.rand(1, 10, 10)
    assert layer.pad_moments(moments, NM(4, 8)) is moments


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_padded_moments_belong_to_padded_weights(conv):
    layer, pattern = Layer("conv", [conv]), NM(4, 8)
    x = torch.randn(conv.groups, 50, conv.weight[0].numel(), dtype=torch.float64)
    taps = conv.weight.flatten(2).shape[2]
    # The inputs, padded as the weights are.
    matrices = layer.matrices(conv.weight.detach(), pattern)
    wide = torch.zeros(conv.groups, 50, taps, matrices.shape[2] // taps, dtype=torch.float64)
    wide[..., : conv.weight.shape[1]] = x.unflatten(2, (taps, -1))
    wide = wide.flatten(2)
    moments = layer.pad_moments(x.mT @ x, pattern)
    torch.testing.assert_close(moments, wide.mT @ wide)
