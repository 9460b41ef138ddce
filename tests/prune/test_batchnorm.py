"""`update_batchnorm`: new statistics after pruning."""

import copy

import pytest
import torch
from torch import nn

from sparsekit.prune import prune, update_batchnorm


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(16, 8, 3)
    ).eval()


def batches(count=4):
    make = torch.Generator().manual_seed(1)
    return [torch.randn(32, 8, 6, 6, generator=make) * 3 + 1 for _ in range(count)]


def test_the_statistics_are_those_of_the_batches():
    model = network()
    assert update_batchnorm(model, batches()) == ["1"]
    seen = [model[0](x).detach() for x in batches()]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)


def test_it_brings_outputs_back_to_their_scale():
    model, x = network(), torch.cat(batches())
    update_batchnorm(model, batches())
    prune(model, "1:4", progress=False)

    @torch.no_grad()
    def deviation():
        return float(model[:2](x).std())

    assert deviation() < 0.9
    update_batchnorm(model, batches())
    assert deviation() == pytest.approx(1, abs=0.01)


def test_flags_momentum_and_weights_stay():
    model = network()
    model[1].momentum, model[2].training = 0.3, True
    weights = [parameter.clone() for parameter in model.parameters()]
    update_batchnorm(model, [(x, 0) for x in batches()], loss=lambda net, pair: net(pair[0]).sum())
    assert model[1].momentum == 0.3
    assert [module.training for module in model] == [False, False, True, False, False]
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))


def test_a_network_without_them_is_left_alone():
    assert update_batchnorm(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)]) == []


def test_one_that_the_batches_do_not_reach_keeps_its_statistics():
    model = nn.Sequential(network(), nn.BatchNorm2d(8))
    model.forward = lambda x: model[0](x)
    model[1].running_mean.fill_(5)
    assert update_batchnorm(model, batches()) == ["0.1"]
    assert bool((model[1].running_mean == 5).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_change_nothing(bad):
    model = network()
    before = copy.deepcopy(model.state_dict())
    data = [*batches(2), torch.full((4, 8, 6, 6), bad)]
    with pytest.raises(ValueError, match="inputs of '1' hold NaN or infinity"):
        update_batchnorm(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="gave no batches"):
        update_batchnorm(network(), [])
