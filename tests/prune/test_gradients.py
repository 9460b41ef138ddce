"""Gradient statistics against autograd by hand, on slices, and what stops them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekit.patterns import NM
from sparsekit.prune import METHODS, gradients, prune
from sparsekit.prune.calibration import read_batches
from sparsekit.prune.reconstruct import ReconstructionOptions, sweep
from sparsekit.prune.scores import Unpruned, with_statistic
from sparsekit.prune.targets import choose_layers


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4))


def labelled(count=3, rows=5):
    make = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 8, generator=make), torch.randint(4, (rows,), generator=make))
        for _ in range(count)
    ]


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def unpruned(model, batches, loss=None, **options):
    chosen, _ = choose_layers(model, "2:4", None, None)
    return Unpruned(model, chosen, read_batches(batches, loss=loss), **options)


def by_hand(model, batches):
    """One gradient for each batch, in float64: `{name: [batches, *shape]}`."""
    model = model.double().eval()
    out = {"0": [], "3": []}
    for x, labels in batches:
        model.zero_grad()
        cross_entropy(model, (x.double(), labels)).backward()
        for name, found in out.items():
            found.append(model.get_submodule(name).weight.grad.clone())
    return {name: torch.stack(found) for name, found in out.items()}


@pytest.mark.parametrize(
    ("statistic", "reference"),
    [
        (gradients.mean, lambda g: g.mean(0)),
        (gradients.mean_absolute, lambda g: g.abs().mean(0)),
        (gradients.mean_square, lambda g: g.square().mean(0)),
    ],
)
def test_each_statistic_is_that_of_the_batches_gradients(statistic, reference):
    found = statistic(unpruned(network(), labelled(), cross_entropy))
    expected = by_hand(network(), labelled())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference(expected[name]), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "score"),
    [
        ("snip", lambda w, g: (w * g.mean(0)).abs()),
        ("taylor", lambda w, g: (w * g).abs().mean(0)),
        ("fisher", lambda w, g: (w * g).square().mean(0)),
    ],
)
def test_what_is_kept_has_the_best_scores(method, score):
    model = network()
    report = prune(model, "bsr1x1@0.6", method, labelled(), loss=cross_entropy, progress=False)
    dense, expected = network().double(), by_hand(network(), labelled())
    for name, mask in report.masks.items():
        best = score(dense.get_submodule(name).weight.detach(), expected[name])
        assert best[mask].min() >= best[~mask].max()


@pytest.mark.parametrize(
    ("method", "kept"),
    [("snip", [False, True]), ("taylor", [True, False]), ("fisher", [True, False])],
)
def test_gradients_that_cancel_count_for_all_but_snip(method, kept):
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.1]])
    batches = [torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, 1.0]])]
    report = prune(model, "1:2", method, batches, loss=lambda m, x: m(x).sum(), progress=False)
    assert report.masks["0"].tolist() == [kept]


def test_a_model_that_computes_its_own_loss_needs_none():
    class WithLoss(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.net, self.kind = network(), kind

        def forward(self, x, labels):
            return self.kind(loss=nn.functional.cross_entropy(self.net(x), labels))

    reference = prune(
        network(), "2:4", "taylor", labelled(), loss=cross_entropy, progress=False
    ).masks
    for kind in (SimpleNamespace, dict):
        batches = [{"x": x, "labels": labels} for x, labels in labelled()]
        report = prune(WithLoss(kind), "2:4", "taylor", batches, progress=False)
        assert all(torch.equal(report.masks[f"net.{n}"], mask) for n, mask in reference.items())


def test_the_model_comes_back_as_it_was():
    model = network().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients.mean(unpruned(model, labelled(), cross_entropy))
    assert [module.training for module in model] == [True, True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert torch.equal(model[0].bias.grad, torch.ones(16))
    assert model[3].weight.grad is None
    assert not model[0].weight._post_accumulate_grad_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_but_the_chosen_weights_gets_a_gradient():
    teacher = network(1)

    def loss(model, batch):
        return (model(batch) - teacher(batch)).square().mean()

    gradients.mean(unpruned(network(), [torch.randn(4, 8)], loss))
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    batches = [(x.to(dtype), labels) for x, labels in labelled()]
    found = gradients.mean_square(unpruned(network().to(dtype), batches, cross_entropy))
    wide = torch.promote_types(dtype, torch.float32)
    assert all(value.dtype == wide for value in found.values())
    expected = by_hand(network(), labelled())["3"].square().mean(0)
    torch.testing.assert_close(found["3"].double(), expected, rtol=0.2, atol=1e-4)


# --- layers that are shared, or not reached -----------------------------------------------------


class Wired(nn.Module):
    """Layers that run twice, under two names, with one weight, and not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.Linear(8, 8)
        self.alias = self.twice
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(self.alias(torch.tanh(self.twice(x))))
        return self.second(torch.tanh(self.first(x)))


def mean_output(model, batch):
    return model(batch).square().mean()


def test_gradients_of_shared_layers_add_up():
    batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found = gradients.mean(unpruned(Wired(), [batch], mean_output))
    assert list(found) == ["twice", "first"]
    model = Wired()
    mean_output(model, batch).backward()
    torch.testing.assert_close(found["twice"], model.twice.weight.grad)
    torch.testing.assert_close(found["first"], model.first.weight.grad)


@pytest.mark.parametrize("method", METHODS)
def test_shared_layers_are_pruned_once(method):
    make = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 8, generator=make) for _ in range(2)]
    model = Wired()
    report = prune(model, "2:4", method, batches, loss=mean_output, progress=False)
    assert list(report.masks) == ["twice", "first"]
    assert model.alias is model.twice
    assert model.second.weight is model.first.weight
    for name, mask in report.masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
    reasons = {layer.name: layer.reason for layer in report.layers if layer.pattern is None}
    assert reasons["second"] == "shares its weight with first: pruned there"
    assert reasons["unused"] in ("no gradient reaches it", "no calibration batch runs it")
    assert bool((model.unused.weight != 0).all())


def test_a_layer_that_only_some_batches_reach_is_averaged_over_all():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.even, self.odd = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.even(x) if x.shape[0] % 2 == 0 else self.odd(x)

    batches = [torch.ones(n, 4) for n in (2, 1, 2, 2)]
    found = gradients.mean(unpruned(Branches(), batches, lambda m, x: m(x).sum() / len(x)))
    torch.testing.assert_close(found["even"], torch.full((4, 4), 0.75))
    torch.testing.assert_close(found["odd"], torch.full((4, 4), 0.25))
    model = Branches()
    report = prune(
        model, "2:4", "snip", batches, "odd", loss=lambda m, x: m(x).sum(), progress=False
    )
    assert list(report.masks) == ["odd"]


@pytest.mark.parametrize("where", [slice(0, 8), slice(8, 16)])
def test_a_slice_of_columns_sees_its_own_gradient(where):
    seen = []

    def score(weight, columns):
        seen.append((columns.start, columns.statistic))
        return weight.abs()

    statistic = torch.arange(64.0).view(4, 16)
    bound = with_statistic(score, statistic)
    bound(torch.ones(4, 16), None)
    assert torch.equal(seen.pop()[1], statistic)
    make = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=make)
    weight = torch.randn(4, 16, generator=make)
    sweep(weight, NM(2, 4), bound, x.t() @ x / 50, ReconstructionOptions(solver_block=8))
    assert [start for start, _ in seen] == [0, 4, 8, 12]
    for start, part in seen:
        assert torch.equal(part, statistic[:, start : start + 4])


@pytest.mark.parametrize("spelling", ["2:4", "bsr4x1@0.5"])
def test_a_sweep_keeps_what_the_gradients_choose_and_lowers_the_error(spelling):
    batches = [(x.repeat(4, 1), labels.repeat(4)) for x, labels in labelled(8)]

    def error(reconstruction):
        model = network()
        report = prune(
            model, spelling, "taylor", batches, reconstruction=reconstruction,
            loss=cross_entropy, progress=False, targets="0",
        )  # fmt: skip
        return report.layers[0].error

    assert error("sweep") < error("none")


# --- a trained network --------------------------------------------------------------------------


def trained():
    """Has learned from features 0 to 3; the others are always zero and have large weights."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    x[:, 4:] = 0
    y = x[:, :4] @ torch.tensor([1.0, -2.0, 0.5, 1.5]) + (x[:, 0] * x[:, 1])
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        model[0].weight[:, 4:] = 3.0 * torch.randn(32, 4)
    return model, list(zip(x.split(16), y.split(16), strict=True))


def squared_error(model, batch):
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


@pytest.mark.parametrize("spelling", ["bsr1x1@0.6", "2:8"])
def test_on_a_trained_network_taylor_and_fisher_beat_magnitude_and_chance(spelling):
    def loss_after(method):
        model, batches = trained()
        prune(model, spelling, method, batches, loss=squared_error, progress=False, targets="0")
        with torch.no_grad():
            return float(sum(squared_error(model, batch) for batch in batches)) / len(batches)

    best = min(loss_after("magnitude"), loss_after("random"))
    assert loss_after("taylor") < 0.5 * best
    assert loss_after("fisher") < 0.5 * best


# --- refusals -----------------------------------------------------------------------------------


def plain(model, batch):
    return model(batch[0]).sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]), r"one value for each batch, got \[5, 4\] for batch 0; average"),
        (lambda m, b: 1.0, "got float for batch 0"),
        (lambda m, b: plain(m, b).detach(), "no gradient reaches any .* without torch.no_grad"),
        (lambda m, b: plain(m, b) * torch.nan, "batch 0 gives the loss nan"),
        (lambda m, b: torch.sqrt(plain(m, b) * 0), "gradient of layer '0' holds NaN or infinity"),
    ],
)
def test_a_loss_that_gives_no_gradient_is_refused(loss, message):
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(model, "2:4", "taylor", labelled(), loss=loss, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_without_a_loss_the_model_must_give_one():
    with pytest.raises(ValueError, match=r"needs a loss, and the model's output \(Tensor\) has no"):
        prune(network(), "2:4", "fisher", [x for x, _ in labelled()], progress=False)


def test_no_gradient_anywhere_is_refused():
    def unrelated(model, batch):
        model(batch[0])
        return torch.ones((), requires_grad=True) * 2

    with pytest.raises(ValueError, match="no gradient reaches any of the layers to prune"):
        prune(network(), "2:4", "snip", labelled(), loss=unrelated, progress=False)
