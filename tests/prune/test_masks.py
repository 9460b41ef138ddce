"""Masks that hold during training."""

import pytest
import torch
from torch import nn

from sparsekit.patterns import NM
from sparsekit.prune import hold_masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def masks_of(model):
    return {name: NM(2, 4).mask(model.get_submodule(name).weight.detach().abs()) for name in "02"}


def train(model, optimizer, steps=5):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 3).square().sum().backward()
        optimizer.step()


def zeros(model, masks):
    return all(
        bool((model.get_submodule(name).weight[~mask] == 0).all()) for name, mask in masks.items()
    )


@pytest.mark.parametrize("watched", [True, False], ids=["given", "any optimizer"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zero_and_the_rest_learns(model, make, watched):
    masks = masks_of(model)
    optimizer = make(model.parameters())
    train(model, optimizer)  # Momentum from before the masks must not move the zeros either.
    handle = hold_masks(model, masks, optimizer if watched else None)
    before = model[0].weight.detach().clone()
    assert zeros(model, masks)
    train(model, optimizer)
    assert zeros(model, masks)
    assert not torch.equal(model[0].weight[masks["0"]], before[masks["0"]])
    handle.remove()
    train(model, optimizer)
    assert not zeros(model, masks)


def test_a_hand_written_update_keeps_zeros_too(model):
    masks = masks_of(model)
    with hold_masks(model, masks):
        (model(torch.ones(2, 8))).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        assert zeros(model, masks)


def test_a_gradient_that_is_not_finite_leaves_zeros_alone(model):
    masks = masks_of(model)
    with hold_masks(model, masks):
        (model(torch.full((2, 8), torch.inf))).sum().backward()
        assert bool((model[0].weight.grad[~masks["0"]] == 0).all())


def test_enforce_zeroes_what_was_written_by_hand(model):
    masks = masks_of(model)
    with hold_masks(model, masks) as handle:
        nn.init.ones_(model[0].weight)
        handle.enforce()
        assert torch.equal(model[0].weight.bool(), masks["0"])


def test_remove_takes_every_hook_off(model):
    optimizer = torch.optim.Adam(model.parameters())
    handle = hold_masks(model, masks_of(model), optimizer)
    assert optimizer._optimizer_step_post_hooks
    assert model[0].weight._backward_hooks
    handle.remove()
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not model[0].weight._backward_hooks


def test_another_optimizer_of_another_model_is_left_alone(model):
    other = nn.Linear(8, 8)
    with hold_masks(model, masks_of(model)):
        train(other, torch.optim.SGD(other.parameters(), 0.1))
    assert bool((other.weight != 0).all())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("7", (8, 8), "no layer '7'"),
        ("1", (8, 8), "no layer '1' with a weight"),
        ("0", (4, 8), r"mask of '0' has shape \[4, 8\], its weight has \[8, 8\]"),
    ],
)
def test_masks_of_another_model_are_refused(model, name, shape, message):
    with pytest.raises(ValueError, match=message):
        hold_masks(model, {name: torch.ones(shape, dtype=torch.bool)})
