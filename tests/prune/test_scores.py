"""Scores and the methods registry."""

import pytest
import torch
from torch import nn

from sparsekit.patterns import NM
from sparsekit.prune import prune, scores
from sparsekit.prune.layers import Layer
from sparsekit.prune.methods import METHODS
from sparsekit.prune.reconstruct import RECONSTRUCTIONS
from sparsekit.prune.scores import (
    Columns,
    Unpruned,
    given,
    magnitude,
    optimal_brain_surgeon,
    wanda,
    with_statistic,
)


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


def test_columns_know_where_they_are():
    statistic = torch.arange(12.0).view(2, 6)
    whole = Columns(torch.arange(6.0), lambda: torch.arange(6.0) + 1, statistic)
    part = whole.slice(2, 5).slice(1, 3)
    assert part.start == 3
    assert part.norms.tolist() == [3.0, 4.0]
    assert part.inverse_diagonal.tolist() == [4.0, 5.0]
    assert torch.equal(part.statistic, statistic[:, 3:5])


def test_magnitude_breaks_ties_of_a_statistic_and_nothing_else():
    weight = torch.tensor([[1.0, -3.0, 2.0, 100.0]])
    statistic = torch.tensor([[1.0, 1.0, 1.0, 0.999]])
    score = with_statistic(given, statistic)(weight, None)
    assert score.argsort(descending=True).tolist() == [[1, 2, 0, 3]]
    zeros = with_statistic(given, torch.ones(1, 4))(torch.zeros(1, 4), None)
    assert torch.equal(zeros, torch.ones(1, 4, dtype=torch.double))


# --- random -------------------------------------------------------------------------------------


def pair(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))


def test_chance_depends_on_the_seed_and_the_layers_name_alone():
    def masks(**options):
        return prune(pair(), "bsr1x1@0.5", "random", progress=False, **options).masks

    first = masks()
    assert not torch.equal(first["1"], first["2"])
    for name, mask in masks(targets=["2", "1"]).items():
        assert torch.equal(mask, first[name])
    assert not torch.equal(masks(seed=1)["1"], first["1"])
    model = pair()
    state = torch.get_rng_state()
    prune(model, "2:4", "random", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_chance_favours_no_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    mask = prune(model, "1:4", "random", progress=False).masks["0"]
    by_place = mask.view(-1, 4).float().mean(0)
    assert torch.allclose(by_place, torch.full((4,), 0.25), atol=0.02)


# --- filters ------------------------------------------------------------------------------------


def near_the_median():
    """Filters around a large common one; 0 to 3 are smaller than the others, and far from them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3)
    with torch.no_grad():
        conv.weight += 10.0
        conv.weight[:4] = torch.randn(4, 8, 3, 3)
    return conv


def test_filters_near_the_geometric_median_go_first():
    conv = near_the_median()
    rows = conv.weight.detach().flatten(1).double()
    sums = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    mask = prune(conv, "bsr1x8@0.25", "fpgm", progress=False).masks[""]
    dropped = (~mask).flatten(1).all(1)
    kept = mask.flatten(1).all(1)
    assert torch.equal(dropped, ~kept)  # whole filters, though a block is one tap of one
    assert int(dropped.sum()) == 4
    assert set(sums.argsort()[:4].tolist()) == set(dropped.nonzero().flatten().tolist())
    assert not set(range(4)) & set(dropped.nonzero().flatten().tolist())
    small = prune(near_the_median(), "bsr1x8@0.25", "magnitude", progress=False).masks[""]
    assert not bool(small[:4].any())  # where magnitude drops the small ones


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_distances_are_the_same_however_they_are_cut(rows, monkeypatch):
    expected = scores.filter_distances(Unpruned(nn.Module(), {"": (layer_of(), NM(2, 4))}))[""]
    monkeypatch.setattr(scores, "_ROWS", rows)
    found = scores.filter_distances(Unpruned(nn.Module(), {"": (layer_of(), NM(2, 4))}))[""]
    torch.testing.assert_close(found, expected)


def layer_of(groups=1):
    torch.manual_seed(0)
    return Layer("", [nn.Conv2d(8 * groups, 12, 3, groups=groups)])


def test_filters_of_a_group_are_compared_with_each_other():
    layer = layer_of(groups=2)
    found = scores.filter_distances(Unpruned(nn.Module(), {"": (layer, NM(2, 4))}))[""]
    rows = layer.weight.detach().flatten(1)
    for group in (slice(0, 6), slice(6, 12)):
        mine = rows[group]
        sums = (mine[:, None] - mine).norm(dim=2).sum(1)
        torch.testing.assert_close(found[group, 0, 0, 0], sums)


# --- stripes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["bsr1x4@0.5", "bsr1x8@0.5"])
def test_the_weakest_taps_go_whole(spelling):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3)
    # One large weight does not save its block when the rest of its stripe is weak.
    conv.weight.data[0, :, 1, 1] = 0.001
    conv.weight.data[0, 3, 1, 1] = conv.weight.detach().abs().max()
    norms = conv.weight.detach().abs().sum(1).flatten()
    mask = prune(conv, spelling, "stripes", progress=False).masks[""]
    kept = mask.all(1)
    assert torch.equal(kept, mask.any(1))
    assert norms[kept.flatten()].min() > norms[~kept.flatten()].max()
    assert int(kept.sum()) == 27


@pytest.mark.parametrize("method", ["fpgm", "stripes"])
def test_magnitude_decides_inside_groups_of_one_filter_or_stripe(method):
    for spelling in ("2:4", "1:8"):
        torch.manual_seed(0)
        ours, theirs = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3)
        theirs.load_state_dict(ours.state_dict())
        found = prune(ours, spelling, method, progress=False).masks[""]
        assert torch.equal(found, prune(theirs, spelling, progress=False).masks[""])


@pytest.mark.parametrize("method", ["fpgm", "stripes"])
def test_a_sweep_drops_the_same_filters_or_stripes(method):
    def run(reconstruction):
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 16, 3)
        batches = [torch.randn(4, 8, 9, 9)]
        return prune(
            conv, "bsr1x8@0.5", method, batches, reconstruction=reconstruction, progress=False
        )

    swept, kept = run("sweep"), run("none")
    assert torch.equal(swept.masks[""], kept.masks[""])
    # Filters that are gone leave nothing that could make up for them.
    better = swept.layers[0].error < kept.layers[0].error
    assert better == (method == "stripes")


def test_what_each_method_needs():
    needs = {name: method.needs for name, method in METHODS.items()}
    assert {name for name, need in needs.items() if need == "nothing"} == {
        "magnitude", "random", "fpgm", "stripes",
    }  # fmt: skip
    assert {name for name, need in needs.items() if need == "gradients"} == {
        "taylor", "fisher", "snip",
    }  # fmt: skip
    assert all(m.needs_calibration == (m.needs != "nothing") for m in METHODS.values())
