"""SynFlow against the paper's laws and a slow reference, and on what is not linear by itself."""

import copy
import math

import pytest
import timm
import torch
import transformers
from torch import nn

from sparsekit.patterns import NM, Pattern, parse_pattern
from sparsekit.prune import gradients, prune, synflow
from sparsekit.prune.calibration import read_batches
from sparsekit.prune.scores import Unpruned
from sparsekit.prune.synflow import linearised
from sparsekit.prune.targets import choose_layers


def perceptron(depth=6, width=20):
    torch.manual_seed(0)
    layers = [nn.Linear(12, width)]
    for _ in range(depth - 2):
        layers += [nn.ReLU(inplace=True), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 3))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.GELU(),
        nn.Conv2d(12, 12, 3, stride=2, groups=2),
        nn.GroupNorm(3, 12),
        nn.SiLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(12, 8),
        nn.LayerNorm(8),
        nn.Sigmoid(),
        nn.Linear(8, 4),
        nn.Softmax(-1),
    )


def unpruned(model, pattern, batch, loss=None, **options):
    chosen, _ = choose_layers(model, pattern, None, None)
    return Unpruned(model, chosen, read_batches([batch], loss=loss), **options)


def flows(model, batch, loss=None):
    given = unpruned(model, "2:4", batch, loss)
    layers = [layer for layer, _ in given.layers.values()]
    with linearised(model, layers, given.batches[0]) as saliency:
        return saliency()


def test_scores_are_those_of_the_linear_network_of_absolute_weights():
    model = perceptron()
    weights = [
        m.weight.detach().double().abs().requires_grad_() for m in model if isinstance(m, nn.Linear)
    ]
    flow = torch.ones(5, 12, dtype=torch.double)
    for weight in weights:
        flow = flow @ weight.t()
    flow.sum().backward()
    found = flows(model, torch.randn(5, 12))
    for value, weight in zip(found.values(), weights, strict=True):
        assert value.dtype == torch.double
        torch.testing.assert_close(value, weight * weight.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("make", "batch"), [(perceptron, (3, 12)), (convolutional, (3, 8, 9, 9))])
def test_the_flow_is_conserved_from_layer_to_layer(make, batch):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    sums = [float(value.sum()) for value in flows(model, torch.randn(batch)).values()]
    assert min(sums) > 0
    assert max(sums) == pytest.approx(min(sums), rel=1e-9)


def test_neurons_pass_on_what_they_take_in():
    model = perceptron(3)
    first, second, third = flows(model, torch.randn(1, 12)).values()
    torch.testing.assert_close(first.sum(1), second.sum(0))
    torch.testing.assert_close(second.sum(1), third.sum(0))


def test_no_data_and_no_sign_counts():
    model, other = convolutional(), convolutional()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    ours = flows(model, torch.randn(2, 8, 9, 9))
    theirs = flows(other, 100 * torch.randn(2, 8, 9, 9))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])


def test_the_model_comes_back_as_it_was():
    model = convolutional().half().train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    storage = [p.data_ptr() for p in model.parameters()]
    synflow.synflow(unpruned(model, "2:4", torch.randn(2, 8, 9, 9).half()))
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


# --- rounds -------------------------------------------------------------------------------------


def by_rounds(model, density, x, rounds=100):
    """Algorithm 1 of the paper, written down plainly: all layers compete for single weights."""
    weights = [m.weight.detach().double().abs() for m in model if isinstance(m, nn.Linear)]
    masks = [torch.ones_like(w) for w in weights]
    for number in range(1, rounds + 1):
        masked = [(w * m).requires_grad_() for w, m in zip(weights, masks, strict=True)]
        flow = torch.ones_like(x, dtype=torch.double)
        for weight in masked:
            flow = flow @ weight.t()
        flow.sum().backward()
        scores = [(w * w.grad).detach() for w in masked]
        # Where whole neurons have died, weights that are still there have a flow of zero as well.
        together = torch.cat([(s - 1 + m).flatten() for s, m in zip(scores, masks, strict=True)])
        keep = round(density ** (number / rounds) * together.numel())
        flat = torch.zeros_like(together)
        flat[together.argsort(descending=True, stable=True)[:keep]] = 1
        parts = flat.split([s.numel() for s in scores])
        masks = [part.view_as(s) for part, s in zip(parts, scores, strict=True)]
    return [mask.bool() for mask in masks]


def best(scores, density):
    """The share of each layer among the best scores of all."""
    together = torch.cat([score.flatten() for score in scores.values()])
    threshold = together.sort(descending=True).values[round(density * together.numel()) - 1]
    return {name: score >= threshold for name, score in scores.items()}


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_competing_layers_are_pruned_as_in_the_paper(density):
    model, x = perceptron(), torch.randn(1, 12)
    found = synflow.synflow(unpruned(model, f"bsr1x1@{1 - density}", x, together=True))
    kept = [value == 1 for value in found.values()]
    for ours, theirs in zip(kept, by_rounds(model, density, x), strict=True):
        assert torch.equal(ours, theirs)


def test_no_layer_collapses_where_magnitude_and_snip_empty_some():
    model, x = perceptron(depth=8, width=40), torch.randn(64, 12)
    with torch.no_grad():  # layers of very different scale, as in networks that narrow
        for index, scale in ((4, 0.05), (8, 0.1), (10, 20.0)):
            model[index].weight.mul_(scale)
    given = unpruned(model, "bsr1x1@0.98", x, lambda m, b: m(b).square().mean(), together=True)
    weights = {name: layer.weight.detach() for name, (layer, _) in given.layers.items()}
    density = 0.02
    mean = gradients.mean(given)
    by_snip = best({n: (w * mean[n]).abs() for n, w in weights.items()}, density)
    by_magnitude = best({n: w.abs() for n, w in weights.items()}, density)
    by_flow = {name: value == 1 for name, value in synflow.synflow(given).items()}
    assert not all(bool(mask.any()) for mask in by_magnitude.values())
    assert not all(bool(mask.any()) for mask in by_snip.values())
    assert all(bool(mask.any()) for mask in by_flow.values())
    # Not merely a weight here and there: something still flows from end to end.
    for name, mask in by_flow.items():
        model.get_submodule(name).weight.data.mul_(mask)
    assert float(flows(model, x)["0"].sum()) > 0
    kept = sum(int(mask.sum()) for mask in by_flow.values())
    assert kept == round(density * sum(w.numel() for w in weights.values()))


def test_scoring_once_is_not_the_same_as_rounds(monkeypatch):
    model, x = perceptron(), torch.randn(1, 12)
    rounds = prune(model, "bsr1x1@0.9", "synflow", [x], progress=False).masks
    monkeypatch.setattr(synflow, "ROUNDS", 1)
    once = prune(perceptron(), "bsr1x1@0.9", "synflow", [x], progress=False).masks
    assert any(not torch.equal(mask, once[name]) for name, mask in rounds.items())

    def flow(masks):
        pruned = perceptron()
        for name, mask in masks.items():
            pruned.get_submodule(name).weight.data.mul_(mask)
        return float(next(iter(flows(pruned, x).values())).sum())

    assert flow(rounds) > flow(once)


@pytest.mark.parametrize("spelling", ["2:4", "1:8", "2:4v4", "bsr4x4@0.75", "bsr1x1@0.9"])
@pytest.mark.parametrize("together", [True, False])
def test_what_survives_all_rounds_is_what_the_pattern_keeps(spelling, together):
    model, x = convolutional(), torch.randn(1, 8, 9, 9)
    pattern = parse_pattern(spelling)
    given = unpruned(model, spelling, x, together=together)
    found = synflow.synflow(given)
    assert found.keys() == given.layers.keys()
    kept = total = 0
    for name, (layer, _) in given.layers.items():
        value = found[name]
        assert float(value.min()) > 0
        assert float(value.max()) <= 1
        rows = layer.matrices(value, pattern).flatten(0, 1)
        if not together:
            assert torch.equal(pattern.mask(rows) & (rows > 0), rows == 1)
        kept, total = kept + int((value == 1).sum()), total + value.numel()
    if together and spelling == "bsr1x1@0.9":
        assert kept == round(0.1 * total)


def test_a_pattern_with_no_denser_ones_is_scored_once():
    class Own(Pattern):
        """2:4 under another name, as a caller's own pattern is."""

        family, sparsity, row_tile, k_tile = "nm", 0.5, 1, 4
        mask, cover, first_violation = (
            getattr(NM(2, 4), name) for name in ("mask", "cover", "first_violation")
        )

    plain = prune(perceptron(), "2:4", "synflow", [torch.randn(1, 12)], progress=False).masks
    own = prune(perceptron(), Own(), "synflow", [torch.randn(1, 12)], progress=False).masks
    assert own.keys() == plain.keys()
    assert all(NM(2, 4).fits(mask.view(len(mask), -1)) for mask in own.values())
    assert all(int(mask.sum()) == int(plain[name].sum()) for name, mask in own.items())


@pytest.mark.parametrize(("spelling", "most"), [("2:4", 3), ("1:4", 4), ("7:8", 2)])
def test_rounds_that_change_nothing_are_left_out(spelling, most, monkeypatch):
    passes = []
    monkeypatch.setattr(synflow, "_flow", lambda *a, run=synflow._flow: passes.append(0) or run(*a))
    prune(perceptron(), spelling, "synflow", [torch.randn(1, 12)], progress=False)
    assert len(passes) == most  # and one to see which layers are reached


# --- models -------------------------------------------------------------------------------------


def text():
    return {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5).long()}


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=12, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.BertModel(config), text()


def llama(attention="sdpa"):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), text() | {"labels": text()["input_ids"]}


def vit():
    model = timm.create_model("vit_tiny_patch16_224", depth=12, img_size=32, num_classes=5)
    return model, torch.randn(1, 3, 32, 32)


def resnet():
    return timm.create_model("resnet26", num_classes=5), torch.randn(1, 3, 96, 96)


def gated():
    return timm.create_model("mobilenetv3_small_050", num_classes=5), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("make", [bert, llama, lambda: llama("eager"), vit, resnet, gated])
def test_something_flows_through_every_layer_of_a_deep_model(make):
    torch.manual_seed(0)
    model, batch = make()
    given = unpruned(model, "2:4", batch)
    found = flows(model, batch)
    assert found.keys() == given.layers.keys()
    for name, value in found.items():
        assert bool(value.isfinite().all()), name
        assert float((value > 0).double().mean()) > 0.5, name


def test_a_norm_that_starts_at_zero_lets_the_flow_pass():
    ours, theirs = convolutional(), convolutional()
    nn.init.zeros_(ours[1].weight)
    for name, value in flows(ours, torch.randn(1, 8, 9, 9)).items():
        assert torch.equal(value, flows(theirs, torch.randn(1, 8, 9, 9))[name])


def test_which_tokens_a_batch_holds_does_not_matter():
    torch.manual_seed(0)
    model, batch = bert()
    first = flows(model, batch)
    second = flows(model, batch | {"input_ids": batch["input_ids"].flip(1) + 7})
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_a_loss_around_the_model_makes_no_difference():
    model, x = perceptron(), torch.randn(4, 12)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    plain = flows(model, x)
    around = flows(model, {"x": x, "y": torch.zeros(4, dtype=torch.long)}, loss)
    for name, value in plain.items():
        assert torch.equal(value, around[name])


def test_a_layer_that_nothing_flows_through_stays_dense():
    model = perceptron()
    model.add_module("unused", nn.Linear(8, 8))
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    report = prune(model, "2:4", "synflow", [torch.randn(2, 12)], progress=False)
    (left,) = [layer for layer in report.layers if layer.pattern is None]
    assert (left.name, left.reason) == ("unused", "no gradient reaches it")
    assert math.isclose(report.sparsity, 0.5)


# --- refusals -----------------------------------------------------------------------------------


def test_a_flow_beyond_float64_is_refused():
    model = perceptron(depth=12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="flow through the model overflows float64"):
        prune(model, "2:4", "synflow", [torch.randn(1, 12)], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_goes_around_the_model_is_refused():
    with pytest.raises(ValueError, match="no output of the model depends on the layers"):
        prune(
            perceptron(),
            "2:4",
            "synflow",
            [torch.randn(1, 12)],
            loss=lambda m, x: m[0](x).sum(),
            progress=False,
        )
