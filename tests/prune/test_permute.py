"""Channel permutations: the network computes the same, the pattern keeps more."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from sparsekit.patterns import Pattern, parse_pattern
from sparsekit.prune import find_permutation, kept_share, permute_channels, prune
from sparsekit.prune.layers import Layer
from sparsekit.prune.permutation import swaps
from sparsekit.prune.permutation.by_hand import _search

PATTERNS = ["2:4", "1:4", "4:8", "2:4v4", "bsr4x4@0.5", "bsr8x8@0.75", "bsr16x2@0.5"]
SHAPES = [(16, 32), (12, 30), (8, 24, 5), (16, 32, 3, 3), (10, 18, 3, 3)]


def weight_of(shape, seed=0):
    """Channels and filters of different scale, as trained ones have."""
    make = torch.Generator().manual_seed(seed)
    scale = torch.randn(shape[0], shape[1], generator=make).exp()
    return torch.randn(shape, generator=make) * scale.view(*shape[:2], *[1] * (len(shape) - 2))


def masked_share(weight, pattern):
    """What `prune` by magnitude keeps of a weight."""
    module = nn.Linear(1, 1) if weight.dim() == 2 else nn.Conv1d(1, 1, 1)
    module.weight = nn.Parameter(weight)
    matrix = Layer("", [module]).matrices(weight, pattern)[0]
    mask = pattern.mask(matrix.abs())
    return float((matrix.abs() * mask).sum() / matrix.abs().sum())


@pytest.mark.parametrize("spelling", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_share_is_that_of_the_magnitude_mask(shape, spelling):
    pattern, weight = parse_pattern(spelling), weight_of(shape)
    assert kept_share(weight, pattern) == pytest.approx(masked_share(weight, pattern), rel=1e-5)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    assert kept_share(weight, spelling, order) == pytest.approx(
        masked_share(weight[:, order], pattern), rel=1e-5
    )


@pytest.mark.parametrize("spelling", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_is_kept_in_the_order_found(shape, spelling):
    weight = weight_of(shape)
    order = find_permutation(weight, spelling)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(shape[1]))
    assert kept_share(weight, spelling, order) > kept_share(weight, spelling)
    assert torch.equal(order, find_permutation([weight.clone()], spelling))


@pytest.mark.parametrize("spelling", ["2:4", "1:4", "bsr4x4@0.5"])
def test_no_swap_is_left_that_keeps_more(spelling):
    weight = weight_of((8, 14))
    order = find_permutation(weight, spelling)
    best = kept_share(weight, spelling, order)
    for a, b in itertools.combinations(range(14), 2):
        swapped = order.clone()
        swapped[[a, b]] = order[[b, a]]
        assert kept_share(weight, spelling, swapped) <= best + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_the_cycles_found_are_the_best_exchange(seed):
    gains = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
    gains[0, 1] = gains[4, 2] = -torch.inf
    taken = swaps.best_cycles(gains)
    best = max(
        float(gains[range(6), order].sum()) for order in map(list, itertools.permutations(range(6)))
    )
    assert float(gains[range(6), taken].sum()) == pytest.approx(best)
    assert torch.equal(swaps.best_cycles(torch.eye(6)), torch.arange(6))


@pytest.mark.parametrize("spelling", ["2:4", "1:4", "2:4v4"])
def test_cycles_gain_where_swaps_do_not(spelling, monkeypatch):
    weight = weight_of((32, 64))
    longer = kept_share(weight, spelling, find_permutation(weight, spelling, rounds=999))
    monkeypatch.setattr(swaps, "_ESCAPES", 0)
    assert kept_share(weight, spelling, find_permutation(weight, spelling, rounds=999)) < longer


@pytest.mark.parametrize("spelling", PATTERNS)
def test_channels_that_compete_are_spread(spelling):
    # Half of the channels are worth nothing, in an order in which they fill whole groups.
    pattern = parse_pattern(spelling)
    weight = torch.rand(16, 32, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    worth = torch.arange(32) % 4 < 2 if spelling.startswith("bsr") else torch.arange(32) < 16
    weight[:, ~worth] = 0
    order = find_permutation(weight, pattern)
    possible = min(1.0, (1 - pattern.sparsity) / 0.5)
    if spelling != "bsr16x2@0.5":  # pairs that are whole already
        assert kept_share(weight, pattern) < 0.8 * possible
    assert kept_share(weight, pattern, order) > 0.97 * possible


def test_all_consumers_count():
    first, second = weight_of((16, 32)), weight_of((8, 32, 3, 3), seed=1)
    both = find_permutation([first, second], "2:4")
    shares = [
        kept_share([first, second], "2:4", order)
        for order in (None, find_permutation(first, "2:4"), find_permutation(second, "2:4"), both)
    ]
    assert max(shares[:3]) < shares[3]
    # Each weight ranks its own blocks: the larger one does not take all of them.
    total = [float(w.abs().sum()) for w in (first, 100 * second)]
    parts = [
        kept_share(first, "bsr4x4@0.5") * total[0],
        kept_share(second, "bsr4x4@0.5") * total[1],
    ]
    assert kept_share([first, 100 * second], "bsr4x4@0.5") == pytest.approx(sum(parts) / sum(total))


def test_rounds_and_rows_bound_the_search():
    weight = weight_of((64, 64))
    shares = [kept_share(weight, "2:4", find_permutation(weight, "2:4", rounds=r)) for r in (1, 2)]
    assert kept_share(weight, "2:4") < shares[0] < shares[1]
    few = find_permutation(weight, "2:4", rows=20)
    assert _search([weight], parse_pattern("2:4"), 20).terms[0].scores.shape == (64, 16)
    assert kept_share(weight, "2:4") < kept_share(weight, "2:4", few)


def test_an_order_found_on_few_rows_is_never_worse():
    weight = torch.tensor([[5.0, 5.0, 0.0, 0.0, 0.0, 0.0, 5.0, 5.0]]).repeat(1000, 1)
    # The one row that is looked at would gain from what costs all others a half.
    weight[0] = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0])
    alone = find_permutation(weight[:1], "2:4")
    assert kept_share(weight, "2:4", alone) < 0.6
    assert torch.equal(find_permutation(weight, "2:4", rows=1), torch.arange(8))


@pytest.mark.parametrize("spelling", ["2:4", "bsr4x4@1.0", "bsr4x4@0.0", "bsr1x1@0.5"])
def test_weights_that_nothing_helps_keep_their_order(spelling):
    for weight in (torch.zeros(8, 16), torch.ones(8, 16), torch.ones(8, 3)):
        assert torch.equal(find_permutation(weight, spelling), torch.arange(weight.shape[1]))
    assert kept_share(torch.zeros(4, 4), "2:4") == 1.0


# --- applying ---------------------------------------------------------------------------------


def norms(channels):
    return {
        "batch": nn.BatchNorm2d(channels),
        "batch, no parameters": nn.BatchNorm2d(channels, affine=False),
        "batch, no statistics": nn.BatchNorm2d(channels, track_running_stats=False),
        "instance": nn.InstanceNorm2d(channels, affine=True),
        "group of all": nn.GroupNorm(1, channels),
        "groups of one": nn.GroupNorm(channels, channels),
        "depthwise": nn.Conv2d(channels, channels, 3, groups=channels),
        "none": None,
    }


def randomised(model):
    make = torch.Generator().manual_seed(3)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=make) + 0.1)
    return model.double().eval()


@pytest.mark.parametrize("kind", norms(4))
def test_the_permuted_network_computes_the_same(kind):
    between = norms(16)[kind]
    producers = [nn.Conv2d(5, 16, 3)] + ([] if between is None else [between])
    consumers = [nn.Conv2d(16, 6, 3), nn.Conv2d(16, 6, 3, bias=False)]
    model = randomised(nn.ModuleList([*producers, *consumers]))

    def run(x):
        for module in producers:
            x = torch.relu(module(x))
        return [module(x).detach() for module in consumers]

    x = torch.randn(2, 5, 9, 9, dtype=torch.float64)
    expected, before = run(x), copy.deepcopy(model.state_dict())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    order = find_permutation([module.weight for module in consumers], "2:4")
    permute_channels(producers, consumers, order)
    for ours, theirs in zip(run(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(producers[0].weight, before["0.weight"][order])
    assert torch.equal(producers[0].bias, before["0.bias"][order])
    assert torch.equal(consumers[0].bias, model.state_dict()[f"{len(producers)}.bias"])
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_linear_layers_and_the_norm_of_their_features():
    model = randomised(
        nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))
    )
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    permute_channels([model[0], model[1]], [model[3]], find_permutation(model[3].weight, "2:4"))
    torch.testing.assert_close(model(x), expected)


def test_a_basic_block_keeps_more_and_computes_the_same():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    for block in [*model.layer1, *model.layer2]:
        before = kept_share(block.conv2.weight, "2:4")
        order = find_permutation(block.conv2.weight, "2:4", rows=256)
        permute_channels([block.conv1, block.bn1], [block.conv2], order)
        assert kept_share(block.conv2.weight, "2:4") > before
    torch.testing.assert_close(model(x), expected)
    prune(model, "2:4", targets="layer1.*", progress=False)


def test_a_residual_stream_is_permuted_as_a_whole():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.body(x))

    model = randomised(Stream())
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = model(x)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permute_channels([model.stem, model.body], [model.body, model.head], order)
    torch.testing.assert_close(model(x), expected)


def test_a_shared_weight_is_permuted_once():
    first, second = nn.Linear(4, 8), nn.Linear(4, 8)
    second.weight = first.weight
    before = first.weight.detach().clone()
    order = torch.arange(8).flip(0)
    permute_channels([first, second, first], [nn.Linear(8, 2)], order)
    assert torch.equal(first.weight, before.flip(0))


def test_an_order_may_be_a_list_of_numbers():
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    before = first.weight.detach().clone()
    permute_channels([first], [second], [2, 0, 1])
    assert torch.equal(first.weight, before[[2, 0, 1]])


# --- refusals ---------------------------------------------------------------------------------


class Balanced(Pattern):
    """A pattern the search does not know."""

    sparsity, row_tile, k_tile = 0.5, 1, 4
    mask = cover = first_violation = None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "2:4"), "no weights; pass those of every layer"),
        ((torch.ones(4), "2:4"), r"shape \[n, channels, ...\], not empty, got \[4\] at 0"),
        (([torch.ones(4, 4), torch.ones(4, 0)], "2:4"), r"got \[4, 0\] at 1"),
        (
            ([torch.ones(4, 4), torch.ones(4, 5)], "2:4"),
            "weight 1 reads 5 channels, the first one 4",
        ),
        ((torch.tensor([[1.0, torch.nan]]), "2:4"), "weight 0 holds NaN or infinities"),
        ((torch.ones(4, 4), "half"), "expected a Pattern or a spelling"),
        ((torch.ones(4, 4), Balanced()), "expected an N:M or block pattern, got .*Balanced"),
    ],
)
def test_weights_that_cannot_be_searched_are_refused(arguments, message):
    for function in (find_permutation, kept_share):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize("option", ["rounds", "rows"])
def test_bounds_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        find_permutation(torch.ones(4, 4), "2:4", **{option: 0})


@pytest.mark.parametrize(
    "order",
    [
        torch.tensor([0, 1, 1, 3]),
        torch.tensor([0, 1, 2, 4]),
        torch.tensor([0, 1, 2, -1]),
        torch.tensor([[0, 1, 2, 3]]),
        torch.tensor([0.0, 1.0, 2.0, 3.0]),
        torch.tensor([True]),
        torch.tensor(0),
    ],
    ids=str,
)
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="expected a permutation that holds each of 0 to"):
        permute_channels([nn.Linear(4, 4)], [nn.Linear(4, 4)], order)
    with pytest.raises(ValueError, match="kept_share: expected a permutation"):
        kept_share(torch.ones(2, 4), "2:4", order)


@pytest.mark.parametrize(
    ("producers", "consumers", "message"),
    [
        ([], [nn.Linear(4, 4)], "producers is empty; name every layer that makes"),
        ([nn.Linear(4, 4)], [], "consumers is empty; name every layer that reads"),
        (
            [nn.Linear(4, 5)],
            [nn.Linear(4, 4)],
            r"weight of producers\[0\] \(Linear\) has shape \[5, 4\]",
        ),
        ([nn.BatchNorm2d(5)], [nn.Linear(4, 4)], r"producers\[0\] \(BatchNorm2d\) has shape \[5\]"),
        ([nn.LayerNorm((4, 3))], [nn.Linear(4, 4)], r"\(LayerNorm\) has shape \[4, 3\]"),
        ([nn.Linear(4, 4)], [nn.Conv2d(5, 4, 1)], r"consumers\[0\] \(Conv2d\) reads 5 channels"),
        ([nn.GroupNorm(2, 4)], [nn.Linear(4, 4)], "GroupNorm of 2 groups, whose statistics"),
        ([nn.Conv2d(4, 4, 1, groups=2)], [nn.Linear(4, 4)], "Conv2d of 2 groups, whose output"),
        ([nn.Conv2d(4, 8, 1, groups=4)], [nn.Linear(8, 4)], "Conv2d of 4 groups, whose output"),
        ([nn.Linear(4, 4)], [nn.Conv2d(4, 4, 1, groups=4)], "groups, whose input"),
        ([nn.ReLU()], [nn.Linear(4, 4)], r"producers\[0\] is a ReLU; expected nn.Linear"),
        ([nn.Linear(4, 4)], [nn.BatchNorm1d(4)], r"consumers\[0\] is a BatchNorm1d; expected"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_modules_that_cannot_be_permuted_are_refused(producers, consumers, message):
    channels = 8 if "of 4 groups" in message else 4
    before = [p.detach().clone() for m in (*producers, *consumers) for p in m.parameters()]
    with pytest.raises(ValueError, match=message):
        permute_channels(producers, consumers, torch.arange(channels).flip(0))
    after = [p for m in (*producers, *consumers) for p in m.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))


def test_parametrised_and_missing_weights_are_refused_and_nothing_is_changed():
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    before = first.weight.detach().clone()
    order = torch.arange(4).flip(0)
    nn.utils.parametrizations.weight_norm(last)
    with pytest.raises(
        ValueError, match=r"weight of consumers\[0\] \(.*Linear\) is parametrised or"
    ):
        permute_channels([first], [last], order)
    with pytest.raises(
        ValueError, match=r"weight of producers\[1\] \(.*Linear\) is parametrised or"
    ):
        permute_channels([first, last], [nn.Linear(4, 4)], order)
    assert torch.equal(first.weight, before)
