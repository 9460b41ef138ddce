"""`permute`: which channels may change places, and that the network computes the same."""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.prune import PermuteReport, kept_share, permute, prune
from sparsekit.prune import channels as driver
from sparsekit.prune import rules
from sparsekit.prune.trace import Trace


def integers(model, seed=0):
    """Small whole numbers in float64: sums are exact in any order."""
    make = torch.Generator().manual_seed(seed)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randint(-3, 4, tensor.shape, generator=make).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.copy_(torch.tensor([0.25, 1.0, 4.0]).repeat(99)[: module.num_features])
            module.eps = 0.0
    return model.eval()


def uneven(model, seed=0):
    """Weights whose channels differ in scale, as trained ones do."""
    make = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
            weight = module.weight.data
            scale = torch.randn(weight.shape[:2], generator=make).exp()
            noise = torch.randn(weight.shape, generator=make) * 0.1
            weight.copy_(noise * scale.view(*weight.shape[:2], *[1] * (weight.dim() - 2)))
    return model.double().eval()


def shuffled(model, example):
    """Every free block of a traced model in a random order, applied in place: sizes of blocks."""
    with torch.no_grad(), driver._quiet(model):
        (batch,) = driver.read_batches([example], "example")
        dimensions, freedom = driver._traced(model, batch)
        moved = np.arange(len(freedom.channel))
        numbers = np.random.default_rng(0)
        sizes = []
        for block in np.flatnonzero(freedom.sizes > 1):
            members = np.flatnonzero((freedom.block == block) & (freedom.channel == moved))
            moved[members] = numbers.permutation(members)
            sizes.append(len(members))
        orders = driver.Orders(freedom, dimensions, [])
        orders._moved = moved
        driver._apply(orders.changes(), inverse=False)
    return sorted(sizes, reverse=True)


def outputs(model, example):
    (batch,) = driver.read_batches([example], "example")
    with torch.no_grad():
        return driver._outputs(model, batch)


def assert_same(ours, theirs, exact):
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        if exact:
            assert torch.equal(tensor, theirs[path]), path
        else:
            torch.testing.assert_close(tensor, theirs[path], rtol=1e-9, atol=1e-11)


# --- architectures ----------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.gate, self.up = nn.Linear(12, 16), nn.Linear(12, 16)
        self.both, self.down = nn.Linear(12, 32), nn.Linear(16, 8)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(torch.relu(gate) * up)


class Block(nn.Module):
    def __init__(self, channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([norm(channels), norm(channels)])

    def forward(self, x):
        inside = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inside)) + x)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24)
        self.deep, self.down = nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)

    def forward(self, x):
        x = F.relu6(self.norm(self.up(x)), inplace=True)
        x = F.relu6(self.deep(x))
        scale = self.excite(torch.relu(self.squeeze(x.sum((2, 3), keepdim=True))))
        return self.down(x * scale)


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.loop = nn.Linear(16, 16)

    def forward(self, x):
        x = self.first(x)
        while x.abs().amax() < 1e6:
            x = x + self.loop(x) if x.sum().item() > 0 else x - self.loop(x)
        return self.last(x)


class Einsum(nn.Module):
    """Parameters of an own shape, read by an einsum."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, 6, 16))
        self.scale = nn.Parameter(torch.ones(16))
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.einsum("bk,hkn->bhn", x, self.up) * self.scale)


def flat(order):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), Permuted(order), nn.Flatten(), nn.Linear(16 * 9, 5)
    )


class Permuted(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


def shared():
    hidden = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(6, 16), hidden, nn.ReLU(), hidden, nn.Linear(16, 3))


def group_norm(groups):
    convs = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
    return nn.Sequential(convs[0], nn.GroupNorm(groups, 16), nn.ReLU(), convs[1])


def grouped():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 4, 1))


def upwards():
    return nn.Sequential(nn.ConvTranspose2d(3, 16, 2), nn.Upsample(scale_factor=2), nn.Conv2d(16, 4, 1))


def image(*shape):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).double()


EXACT = {
    "mlp": (mlp, image(4, 6), [24, 16]),
    "tokens": (mlp, image(2, 3, 6), [24, 16]),
    "gated": (lambda: Gated(fused=False), image(4, 12), [16]),
    "fused gate": (lambda: Gated(fused=True), image(4, 12), [16]),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8), nn.Conv2d(8, 4, 1)),
        image(2, 3, 8, 8),
        [8, 8, 8],
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.MaxPool1d(2), nn.Conv1d(16, 4, 1)),
        image(2, 3, 8),
        [16],
    ),
    "concatenation": (Dense, image(2, 3, 6, 6), [8, 8, 8, 8]),
    "depthwise": (Depthwise, image(2, 8, 6, 6), [24, 8]),
    "flattened": (lambda: flat((0, 1, 2, 3)), image(2, 3, 5, 5), [16]),
    "flattened, channels last": (lambda: flat((0, 2, 3, 1)), image(2, 3, 5, 5), [16]),
    "control flow": (Branching, image(3, 6), [16]),
    "einsum": (Einsum, image(3, 6), [16]),
    "shared layer": (shared, image(4, 6), [16]),
    "groups": (grouped, image(2, 3, 6, 6), [8, 8]),
    "transposed convolution": (upwards, image(2, 3, 4, 4), [16]),
}


@pytest.mark.parametrize("name", EXACT)
def test_any_order_it_calls_free_computes_exactly_the_same(name):
    make, example, sizes = EXACT[name]
    model = integers(make())
    before = outputs(model, example)
    weights = copy.deepcopy(model.state_dict())
    assert shuffled(model, example)[: len(sizes)] == sizes
    assert any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert_same(outputs(model, example), before, exact=True)
    assert all(float(value.abs().max()) > 0 for value in before.values())
