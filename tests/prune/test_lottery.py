"""Lottery tickets: rounds, rewinding, and that a ticket is worth more than its sparsity."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from sparsekit.patterns import parse_pattern
from sparsekit.prune import find_lottery_ticket, hold_masks
from sparsekit.prune.training.lottery import TICKET_SCORES


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 48)
        self.norm = nn.BatchNorm1d(48)
        self.second = nn.Linear(48, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        return self.head(functional.relu(self.second(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def train(model, digits, steps):
    x, y = digits
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    for step in range(steps):
        rows = torch.randint(1200, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def loss_of(model, digits):
    x, y = digits
    return float(functional.cross_entropy(model.eval()(x[1200:]), y[1200:]).detach())


@pytest.mark.parametrize("method", TICKET_SCORES)
@pytest.mark.parametrize("pattern", ["bsr1x1@0.9", "2:4", "1:8v4", "bsr4x4@0.75"])
def test_densities_fall_geometrically_to_the_pattern(model, digits, pattern, method):
    seen = []

    def train_and_look(net, masks):
        for name, mask in masks.items():
            assert not bool(net.get_submodule(name).weight[~mask].any())
        train(net, digits, 3)
        seen.append({name: mask.clone() for name, mask in masks.items()})

    initial = copy.deepcopy(model.state_dict())
    report = find_lottery_ticket(
        model, pattern, train_and_look, rounds=4, method=method, ignore="head"
    )
    density = 1 - parse_pattern(pattern).sparsity
    for done, masks in enumerate([*seen, report.masks]):
        for name, mask in masks.items():
            assert float(mask.float().mean()) == pytest.approx(density ** (done / 4), abs=0.01)
            if done:
                assert not bool((mask & ~seen[done - 1][name]).any())
    for name, mask in report.masks.items():
        assert parse_pattern(pattern).fits(mask)
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, initial[f"{name}.weight"] * mask)
    for name, value in model.state_dict().items():  # biases, normalisation and its statistics
        if name.removesuffix(".weight") not in report.masks:
            assert torch.equal(value, initial[name]), name
    assert report.method == f"lottery ({method})"


def test_it_rewinds_to_a_step_of_the_first_training(model, digits):
    early = copy.deepcopy(model)
    train(early, digits, 5)
    report = find_lottery_ticket(
        model, "2:4", lambda net, _: train(net, digits, 20), rounds=2, rewind=5
    )
    for name, value in early.state_dict().items():
        mask = report.masks.get(name.removesuffix(".weight"), torch.ones(()))
        assert torch.equal(model.state_dict()[name], value * mask), name


def test_it_keeps_trained_weights_where_nothing_is_rewound(model, digits):
    last = {}

    def train_and_look(net, masks):
        train(net, digits, 10)
        last.update(copy.deepcopy(net.state_dict()))

    report = find_lottery_ticket(model, "bsr4x4@0.5", train_and_look, rounds=3, rewind=None)
    for name, value in model.state_dict().items():
        mask = report.masks.get(name.removesuffix(".weight"), torch.ones(()))
        assert torch.equal(value, last[name] * mask), name


def test_what_the_methods_keep():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    before, after = torch.tensor([[5.0, 1.0, -3.0, 1.0]]), torch.tensor([[4.0, 2.0, 3.0, -1.5]])
    keeps = {"magnitude": [0, 2], "magnitude_increase": [1, 3], "movement": [2, 3]}
    assert set(keeps) == set(TICKET_SCORES)
    for method, columns in keeps.items():
        model[0].weight.data.copy_(before)
        report = find_lottery_ticket(
            model,
            "2:4",
            lambda net, _: net[0].weight.data.copy_(after),
            rounds=1,
            method=method,
        )
        assert report.masks["0"][0].nonzero().flatten().tolist() == columns


def test_a_ticket_learns_better_than_a_random_mask(model, digits):
    # In float64, so that the order of summation, which varies with the threads, decides nothing.
    model, digits = model.double(), (digits[0].double(), digits[1])
    start = copy.deepcopy(model)
    report = find_lottery_ticket(
        model, "bsr1x1@0.95", lambda net, _: train(net, digits, 120), rounds=5, ignore="head"
    )
    losses = []
    for seed in (None, 1, 2):
        net, masks = model, report.masks
        if seed is not None:
            net = copy.deepcopy(start)
            make = torch.Generator().manual_seed(seed)
            masks = {
                name: mask.flatten()[torch.randperm(mask.numel(), generator=make)].view_as(mask)
                for name, mask in masks.items()
            }
        with hold_masks(net, masks):
            train(net, digits, 120)
        losses.append(loss_of(net, digits))
    assert losses[0] < 0.7 * min(losses[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rewind": -1}, "rewind must be at least 0 or None, got -1"),
        ({"method": "mgnitude"}, "unknown method 'mgnitude'; known are magnitude, magnitude_inc"),
        ({"targets": "nothing"}, "'nothing' matches no layer"),
        ({"rewind": 9}, "rewind=9, but the training made 4 steps of a torch.optim optimizer"),
    ],
)
def test_bad_arguments(model, digits, arguments, message):
    other = nn.Linear(2, 2)

    def train_both(net, masks):
        train(net, digits, 4)
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        for _ in range(20):  # of another model: these do not count
            optimizer.step()

    with pytest.raises(ValueError, match=message):
        find_lottery_ticket(model, "2:4", train_both, **{"rounds": 2, **arguments})
    assert not model.first.weight._backward_hooks


def test_weights_that_are_not_finite(model):
    def diverge(net, masks):
        nn.init.constant_(net.second.weight, torch.nan)

    with pytest.raises(ValueError, match="weight of 'second' holds NaN or infinities"):
        find_lottery_ticket(model, "2:4", diverge, rounds=2)
    with pytest.raises(ValueError, match="weight of 'second' holds NaN or infinities"):
        find_lottery_ticket(model, "2:4", diverge, rounds=2)
