"""Scores and the methods registry."""

import torch

from sparsekit.prune.methods import METHODS
from sparsekit.prune.reconstruct import RECONSTRUCTIONS
from sparsekit.prune.scores import Columns, magnitude, optimal_brain_surgeon, wanda


def columns(norms, inverse=()):
    return Columns(torch.tensor(norms), lambda: torch.tensor(inverse))


def test_magnitude_is_the_absolute_value():
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0]])
    assert torch.equal(magnitude(weight, None), torch.tensor([[1.0, 3.0, 0.0, 2.0]]))


def test_wanda_orders_by_weight_times_input_norm():
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0]])
    score = wanda(weight, columns([1.0, 8.0, 3.0, 0.5]))
    product = weight.abs() * torch.tensor([1.0, 8.0, 3.0, 0.5])
    assert torch.equal(score.argsort(), product.argsort())
    assert torch.equal(score, product.square())


def test_surgeon_divides_by_the_inverse_diagonal():
    weight = torch.tensor([[2.0, 2.0, -4.0]])
    score = optimal_brain_surgeon(weight, columns([1.0, 1.0, 1.0], [0.5, 4.0, 2.0]))
    assert torch.equal(score, torch.tensor([[8.0, 1.0, 8.0]]))


def test_every_method_names_a_known_reconstruction():
    assert {method.reconstruction for method in METHODS.values()} <= set(RECONSTRUCTIONS)


def test_nothing_is_inverted_for_a_score_that_does_not_ask():
    def refuse():
        raise AssertionError("inverted")

    wanda(torch.ones(1, 2), Columns(torch.ones(2), refuse))
