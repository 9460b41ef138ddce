"""Each method of sparse training does what its paper says."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from sparsekit.patterns import parse_pattern
from sparsekit.prune import prune, train_sparse

PATTERNS = ["2:4", "1:4v4", "bsr4x4@0.75"]


def layer_of(n=16, k=32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(k, n, bias=False))


def pull(model, directions, optimizer):
    """A step along a gradient that is known: the loss is linear in the weights."""
    optimizer.zero_grad()
    sum((p * d).sum() for p, d in zip(model.parameters(), directions, strict=True)).backward()
    optimizer.step()


def random_like(model, seed):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=make) for p in model.parameters()]


def tiles_of(pattern, n, k):
    """Index lists of the weights of each unit, and for each unit who it competes with."""
    pattern = parse_pattern(pattern)
    rows, columns = pattern.row_tile, pattern.k_tile
    units, pools = [], []
    for row in range(0, n, rows):
        for column in range(0, k, columns):
            if pattern.family == "nm":
                for j in range(columns):
                    units.append([(row + i, column + j) for i in range(rows)])
                    pools.append((row, column))
            else:
                units.append([(row + i, column + j) for i in range(rows) for j in range(columns)])
                pools.append(0)
    return units, pools


# --- gradual ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradual_follows_the_cubic_curve(pattern):
    model = layer_of(32, 64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    final, steps, every, first, last = parse_pattern(pattern).sparsity, 100, 5, 20, 80
    unit = parse_pattern(pattern).row_tile * (4 if "bsr" in pattern else 1)
    gone = torch.zeros(32, 64, dtype=torch.bool)
    options = {"every": every, "start": 0.2, "end": 0.8}
    with train_sparse(model, pattern, "gradual", optimizer, steps=steps, **options) as run:
        for step in range(1, steps + 1):
            pull(model, random_like(model, step), optimizer)
            done = min(step, last) - first
            passed = max(0, done - done % every) / (last - first)
            wanted = final * (1 - (1 - passed) ** 3)
            assert run.sparsity == pytest.approx(wanted, abs=0.51 * unit / gone.numel()), step
            assert not bool((gone & run.masks["0"]).any())  # what is gone stays gone
            gone = ~run.masks["0"]
            assert not bool(model[0].weight[gone].any())
    assert run.sparsity == final


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradual_without_training_is_one_shot_pruning(pattern):
    model, other = layer_of(), layer_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with train_sparse(model, pattern, "gradual", optimizer, steps=40, every=3):
        for step in range(40):
            pull(model, random_like(model, step), optimizer)
    prune(other, pattern, progress=False)
    assert torch.equal(model[0].weight, other[0].weight)


def test_gradual_drops_the_lowest_first():
    model = layer_of()
    weight = model[0].weight.detach().abs().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = train_sparse(model, "bsr1x1@0.5", "gradual", optimizer, steps=10, every=1, end=1.0)
    pull(model, random_like(model, 0), optimizer)
    mask = run.masks["0"]
    assert weight[~mask].max() < weight[mask].min()
    run.finish(early=True)


# --- RigL and SET -----------------------------------------------------------------------------


def swapped(weight, gradient, mask, pattern, fraction):
    """RigL's update, unit by unit."""
    units, pools = tiles_of(pattern, *weight.shape)
    size = [float(sum(weight[i].abs() for i in unit)) for unit in units]
    slope = [float(sum(gradient[i].abs() for i in unit)) for unit in units]
    kept = [u for u, unit in enumerate(units) if mask[unit[0]]]
    dropped = sorted(kept, key=lambda u: size[u])[: round(fraction * len(kept))]
    staying = set(kept) - set(dropped)
    for pool in set(pools):
        lost = sum(pools[u] == pool for u in dropped)
        free = [u for u in range(len(units)) if pools[u] == pool and u not in staying]
        staying |= set(sorted(free, key=lambda u: -slope[u])[:lost])
    out = torch.zeros_like(mask)
    for u in staying:
        for i in units[u]:
            out[i] = True
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rigl_swaps_as_the_slow_loop_does(pattern):
    model = layer_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    steps, every = 40, 4
    options = {"drop": 0.5, "every": every, "end": 0.75}
    with train_sparse(model, pattern, "rigl", optimizer, steps=steps, **options) as run:
        moved = 0
        for step in range(1, steps + 1):
            (gradient,) = random_like(model, step)
            before, mask = model[0].weight.detach().clone(), run.masks["0"].clone()
            pull(model, [gradient], optimizer)
            if step % every == 0 and step <= 30:
                fraction = 0.25 * (1 + math.cos(math.pi * step / 30))
                mask = swapped(before, gradient, mask, pattern, fraction)
                moved += not torch.equal(mask, run.masks["0"])
            assert torch.equal(run.masks["0"], mask)
            assert parse_pattern(pattern).fits(mask)
            expected = (before - 0.01 * gradient).masked_fill(~mask, 0)
            torch.testing.assert_close(model[0].weight.detach(), expected)
    assert moved == 0


def test_rigl_and_set_change_masks_and_differ():
    masks = {}
    for method in ("rigl", "set"):
        model = layer_of()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with train_sparse(model, "2:4", method, optimizer, steps=20, every=4) as run:
            first = run.masks["0"].clone()
            for step in range(20):
                pull(model, random_like(model, step), optimizer)
        masks[method] = run.masks["0"]
        assert 0.6 < float((first == masks[method]).float().mean()) < 0.95
    assert not torch.equal(masks["rigl"], masks["set"])


def test_the_first_masks_are_random_and_the_seeds():
    first = {}
    for seed in (0, 0, 1):
        model = layer_of()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        run = train_sparse(model, "bsr1x1@0.75", "set", optimizer, steps=5, seed=seed)
        assert torch.equal(first.setdefault(seed, run.masks["0"]), run.masks["0"])
        run.finish(early=True)
    assert not torch.equal(first[0], first[1])
    magnitude = parse_pattern("bsr1x1@0.75").mask(layer_of()[0].weight.detach().abs())
    assert float((first[0] & magnitude).float().mean()) == pytest.approx(0.0625, abs=0.03)


@pytest.mark.parametrize("steps", [10, 400])
def test_swaps_happen_in_short_trainings_too(steps):
    model = layer_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    updates = set()
    with train_sparse(model, "2:4", "set", optimizer, steps=steps) as run:
        for step in range(steps):
            before = run.masks["0"].clone()
            pull(model, random_like(model, step), optimizer)
            if not torch.equal(run.masks["0"], before):
                updates.add(step + 1)
    every = {10: 1, 400: 6}[steps]
    assert updates <= set(range(every, round(0.75 * steps) + 1, every))
    assert len(updates) > 0.5 * 0.75 * steps / every


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_momentum_of_swapped_weights_is_cleared(method):
    model = layer_of()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, amsgrad=True)
    with train_sparse(model, "2:4", method, optimizer, steps=8, every=4, drop=1.0) as run:
        for step in range(3):
            pull(model, random_like(model, step), optimizer)
        old = run.masks["0"].clone()
        state = copy.deepcopy(optimizer.state[model[0].weight])
        (gradient,) = random_like(model, 3)
        pull(model, [gradient], optimizer)
        new = run.masks["0"]
        assert bool((old & ~new).any())
        assert bool((new & ~old).any())
        now = optimizer.state[model[0].weight]
        # Only RigL has the gradient of what it grows.
        alone = gradient.masked_fill(~new if method == "rigl" else ~(old & new), 0)
        for name, factor, power in (("exp_avg", 0.1, 1), ("exp_avg_sq", 0.001, 2)):
            assert not bool(now[name][~new].any())
            fresh = factor * alone**power
            torch.testing.assert_close(now[name][new & ~old], fresh[new & ~old])
            decayed = (1 - factor) * state[name] + fresh
            torch.testing.assert_close(now[name][new & old], decayed[new & old])
        for step in range(4, 8):
            pull(model, random_like(model, step), optimizer)


def test_rigl_finds_the_inputs_that_matter():
    """Half of each group of four is noise: RigL's 2:4 mask ends on the other half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    useful = torch.tensor([1.0, 0, 0, 1]).repeat(8)
    target = torch.randn(8, 32) * useful
    with train_sparse(model, "2:4", "rigl", optimizer, steps=200, every=5, drop=0.5) as run:
        for step in range(200):
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x @ target.T).square().mean().mul(10).backward()
            optimizer.step()
    assert float(run.masks["0"][:, useful.bool()].float().mean()) > 0.97


# --- SR-STE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sr_ste_steps_dense_weights_by_the_sparse_ones_gradient(pattern):
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dense = model[0].weight.detach().clone()
    x = torch.randn(16, 32)
    with train_sparse(model, pattern, "sr_ste", optimizer, steps=6, decay=0.3, targets="0") as run:
        for _ in range(6):
            mask = parse_pattern(pattern).mask(dense.abs())
            assert torch.equal(model[0].weight, dense * mask)
            assert torch.equal(run.masks["0"], mask)
            leaf = (dense * mask).requires_grad_()
            hidden = torch.tanh(functional.linear(x, leaf, model[0].bias))
            functional.linear(hidden, model[2].weight, model[2].bias).square().mean().backward()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            dense = dense - 0.1 * (leaf.grad + 0.3 * dense * ~mask)
            torch.testing.assert_close(run.state_dict()["tensors"]["0/dense"], dense)
            dense = run.state_dict()["tensors"]["0/dense"].clone()


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def classifier(seed=0):
    torch.manual_seed(seed)
    hidden = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(32, 10))


def fit(model, optimizer, digits, steps):
    x, y = digits
    for step in range(steps):
        rows = torch.randint(1200, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def loss_of(model, digits):
    x, y = digits
    return float(functional.cross_entropy(model(x[1200:]), y[1200:]).detach())


def one_shot(digits, pattern, steps):
    model = classifier()
    fit(model, torch.optim.Adam(model.parameters(), 3e-3), digits, steps)
    prune(model, pattern, ignore="4", progress=False)
    return loss_of(model, digits)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradual", {}),
        ("rigl", {"every": 10}),
        ("set", {"every": 10}),
        ("sr_ste", {}),
        ("group_lasso", {"strength": 0.1}),
        ("dsa", {}),
    ],
)
def test_it_learns_better_than_one_shot_pruning_of_the_same_budget(method, options, digits):
    steps = 200
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    arguments = {"steps": steps, "ignore": "4", **options}
    with train_sparse(model, "1:4", method, optimizer, **arguments) as run:
        fit(model, optimizer, digits, steps)
    assert run.sparsity >= 0.74
    assert loss_of(model, digits) < 0.5 * one_shot(digits, "1:4", steps)


# --- group lasso ------------------------------------------------------------------------------


def test_group_lasso_is_the_proximal_operator():
    """Without a gradient, every block's norm shrinks by lr · strength · √size, down to zero."""
    model = layer_of()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.5}], lr=9.0)
    blocks = model[0].weight.detach().unflatten(0, (4, 4)).unflatten(2, (8, 4)).clone()
    norms = blocks.square().sum((1, 3), keepdim=True).sqrt()
    strength = float(norms.median()) / (0.5 * 4 * 3)  # half are gone after three steps
    options = {"strength": strength, "end": 1.0, "groups": "all"}
    with train_sparse(model, "bsr4x4@0.25", "group_lasso", optimizer, steps=4, **options) as run:
        for _ in range(3):
            pull(model, [torch.zeros(16, 32)], optimizer)
            blocks *= (1 - 0.5 * strength * 4 / norms).clamp_min(0)
            norms = (norms - 0.5 * strength * 4).clamp_min(0)
            got = model[0].weight.detach().unflatten(0, (4, 4)).unflatten(2, (8, 4))
            torch.testing.assert_close(got, blocks.nan_to_num(), atol=1e-6, rtol=1e-4)
        assert run.sparsity == pytest.approx(0.5, abs=0.04)
        run.finish(early=True)


def test_group_lasso_on_filters():
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    strength = float(norms.sort().values[2] + 1e-3) / (0.5 * math.sqrt(72))
    options = {"strength": strength, "groups": "filters"}
    run = train_sparse(model, "2:4", "group_lasso", optimizer, steps=9, **options)
    pull(model, [torch.zeros(6, 8, 3, 3), torch.zeros(6)], optimizer)
    now = model[0].weight.detach().flatten(1).norm(dim=1)
    expected = (norms - 0.5 * strength * math.sqrt(72)).clamp_min(0)
    torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-4)
    assert int((now == 0).sum()) == 3
    run.finish(early=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_group_lasso_leaves_what_the_pattern_keeps(pattern):
    model = layer_of()
    before = model[0].weight.detach().clone()
    mask = parse_pattern(pattern).mask(before.abs())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    run = train_sparse(model, pattern, "group_lasso", optimizer, steps=9, strength=0.002)
    pull(model, [torch.zeros(16, 32)], optimizer)
    after = model[0].weight.detach()
    assert torch.equal(after[mask], before[mask])
    assert bool((after[~mask].abs() < before[~mask].abs()).all())
    run.finish(early=True)


def test_too_strong_a_group_lasso_ends_at_the_pattern(digits):
    for groups in ("all", "dropped"):
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        options = {"steps": 60, "end": 1.0, "targets": "0", "strength": 1.0, "groups": groups}
        run = train_sparse(model, "bsr4x4@0.5", "group_lasso", optimizer, **options)
        fit(model, optimizer, digits, 59)
        assert run.sparsity == (1.0 if groups == "all" else 0.5)
        run.finish(early=True)


def test_group_lasso_empties_blocks_that_pruning_then_costs_nothing(digits):
    lost, zeros = {}, {}
    for strength in (1e-9, 0.05):
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        options = {"steps": 250, "targets": "0", "strength": strength, "end": 1.0}
        run = train_sparse(model, "bsr4x4@0.5", "group_lasso", optimizer, **options)
        fit(model, optimizer, digits, 249)
        before, zeros[strength] = loss_of(model, digits), run.sparsity
        run.finish(early=True)
        lost[strength] = loss_of(model, digits) - before
    assert zeros[1e-9] < 0.01
    assert zeros[0.05] > 0.4
    assert lost[0.05] < 0.2 * lost[1e-9]


# --- DSA --------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """A layer whose input matters and one whose input hardly does."""

    def __init__(self):
        super().__init__()
        self.loud = nn.Linear(32, 32, bias=False)
        self.quiet = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.loud(x) + self.quiet(0.1 * x)


@pytest.mark.parametrize("pattern", ["bsr2x2@0.5", "4:8", "bsr1x1@0.75"])
def test_dsa_gives_to_the_layer_that_matters_and_keeps_the_budget(pattern):
    torch.manual_seed(0)
    teacher = TwoInputs()
    x = torch.randn(256, 32)
    wanted = teacher(x).detach()
    model, uniform = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with train_sparse(model, pattern, "dsa", optimizer, steps=80, end=1.0) as run:
        for _ in range(80):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
    density = 1 - parse_pattern(pattern).sparsity
    kept = {name: float((p != 0).float().mean()) for name, p in model.named_parameters()}
    assert kept["loud.weight"] > 1.4 * density
    assert kept["quiet.weight"] < 0.6 * density
    assert density - 0.02 < 1 - run.sparsity <= density
    found = {name: p and 1 - p.sparsity for name, p in run.allocation.items()}
    assert (found["loud"] or 1.0) > found["quiet"]
    # The mapping is one that `prune` takes, and pruning by it loses less than uniformly.
    pruned = copy.deepcopy(teacher)
    prune(pruned, run.allocation, progress=False)
    prune(uniform, pattern, progress=False)
    losses = [float((net(x) - wanted).detach().square().mean()) for net in (pruned, uniform)]
    assert losses[0] < 0.5 * losses[1]


def test_dsa_follows_the_gradients_autograd_gives():
    torch.manual_seed(0)
    model = TwoInputs()
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, wanted = torch.randn(64, 32), torch.randn(64, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"steps": 10, "temperature": 0.3}
    run = train_sparse(model, "2:4", "dsa", optimizer, **options)

    ratios = torch.tensor([0.5, 0.5], requires_grad=True)
    leaves, effective = [], []
    for ratio, weight in zip(ratios, full.values(), strict=True):
        place = torch.zeros(32, 32)
        for row in range(32):
            for column in range(0, 32, 4):
                group = weight[row, column : column + 4].abs().tolist()
                for j, value in enumerate(group):
                    place[row, column + j] = (sum(v > value for v in group) + 0.5) / 4
        leaves.append(weight.clone().requires_grad_())
        effective.append(leaves[-1] * torch.sigmoid((ratio - place) / 0.3))
    for parameter, value in zip(model.parameters(), effective, strict=True):
        torch.testing.assert_close(parameter.detach(), value.detach())
    out = x @ effective[0].T + (0.1 * x) @ effective[1].T
    (out - wanted).square().mean().backward()

    optimizer.zero_grad()
    (model(x) - wanted).square().mean().backward()
    optimizer.step()
    tensors = run.state_dict()["tensors"]
    slopes = 0.1 * ratios.grad / (32 * 32) * 0.3  # before the division by the temperature
    torch.testing.assert_close(tensors["slopes"].float(), slopes, rtol=1e-4, atol=1e-9)
    for name, leaf in zip(("loud", "quiet"), leaves, strict=True):
        torch.testing.assert_close(tensors[f"{name}/full"], leaf.detach() - 0.1 * leaf.grad)
    run.finish(early=True)


def test_dsa_leaves_a_layer_dense_where_it_pays():
    torch.manual_seed(0)
    model = TwoInputs()
    x = torch.randn(256, 32)
    wanted = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    options = {"steps": 60, "end": 1.0, "rate": 0.1}
    with train_sparse(model, {"loud": "3:4", "quiet": "2:4"}, "dsa", optimizer, **options) as run:
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
    assert run.allocation["loud"] is None
    assert str(run.allocation["quiet"]) == "1:4"
    assert set(run.report.masks) == {"quiet"}
    (loud,) = [layer for layer in run.report.layers if layer.name == "loud"]
    assert (loud.pattern, loud.sparsity) == (None, 0.0)
    assert loud.reason == "the allocation keeps all of it"
