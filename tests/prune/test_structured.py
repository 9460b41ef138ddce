"""Structured pruning: what is cut, that the rest computes the same, and that patterns follow."""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

import sparsekit as sk
from bench.digits import DigitsResNet
from bench.vision import import_torchvision
from sparsekit.prune import METHODS, prune_structured

import_torchvision()

from transformers import BertConfig, BertModel  # noqa: E402 - after a torchvision that may be broken


def resnet():
    torch.manual_seed(0)
    model = DigitsResNet().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # As after training: no two channels alike.
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.rand(len(tensor)) + 0.1)
    return model, torch.rand(6, 1, 8, 8)


def bert(attention="sdpa"):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    config._attn_implementation = attention
    model = BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return model, {"input_ids": torch.randint(50, (2, 8)), "attention_mask": mask}


MODELS = {"resnet": resnet, "bert": bert, "bert, eager": lambda: bert("eager")}


def run(model, inputs):
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs).last_hidden_state
        return model(inputs)


def without(model, report):
    """The dense model in which nobody reads the channels that were cut."""
    model = copy.deepcopy(model)
    for group in report.groups:
        dropped = torch.ones(group.before, dtype=torch.bool)
        dropped[list(group.kept)] = False
        for name in group.readers:
            model.get_submodule(name).weight.data[:, dropped] = 0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_computes_what_the_dense_one_does_without_these_channels(name):
    model, inputs = MODELS[name]()
    dense = copy.deepcopy(model)
    report = prune_structured(model, inputs, sparsity=0.5)
    assert sum(group.after < group.before for group in report.groups) == 5 - ("bert" in name)
    assert all(group.after % 16 == 0 for group in report.groups if not group.reason)
    before, after = report.parameters
    assert sum(p.numel() for p in model.parameters()) == after < 0.6 * before
    expected = run(without(dense, report), inputs)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, run(dense, inputs), rtol=1e-2)
    assert "they are outputs of the model" in {group.reason for group in report.groups}
    assert f"{before:,} -> {after:,} parameters" in str(report)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_patterns_and_kernels_follow(name):
    model, inputs = MODELS[name]()
    prune_structured(model, inputs, sparsity=0.5)
    report = sk.prune(model, "2:4", progress=False)
    assert report.sparsity == pytest.approx(0.5)
    expected = run(model, inputs)
    sparse = copy.deepcopy(model)
    example = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    rows = sk.convert(
        sparse, "2:4", example, gate="always", targets=list(report.masks), progress=False
    ).rows
    assert sum(row.verdict == "sparse" for row in rows) == len(report.masks)
    torch.testing.assert_close(run(sparse, inputs), expected, rtol=1e-4, atol=1e-4)


def test_whole_heads_go_and_the_module_knows():
    model, inputs = bert()
    # Head 2 of the first block is worth nothing; then 1 is worth least.
    attention = model.encoder.layer[0].attention
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        linear.weight.data[32:48] *= 1e-3
        linear.weight.data[16:32] *= 1e-2
    attention.output.dense.weight.data[:, 16:48] *= 1e-3
    report = prune_structured(model, inputs, sparsity=0.5, targets="*.layer.0.attention.self.*")
    (cut,) = [group for group in report.groups if group.after < group.before]
    assert cut.heads == (4, 2)
    assert cut.kept == (*range(16), *range(48, 64))
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (2, 32)
    assert "4 -> 2" in str(report)
    assert all("targets=" in g.reason or "outputs" in g.reason for g in report.groups if g != cut)


def test_heads_that_no_module_tells():
    model, inputs = bert()
    for layer in model.encoder.layer:
        del layer.attention.self.num_attention_heads
    attention = "*.attention.self.*"
    with pytest.raises(ValueError, match="an unknown number of heads; pass heads="):
        prune_structured(model, inputs, sparsity=0.5, targets=attention)
    with pytest.raises(ValueError, match="64 output channels, which 5 heads cannot share"):
        prune_structured(model, inputs, sparsity=0.5, targets=attention, heads={attention: 5})
    report = prune_structured(model, inputs, sparsity=0.5, targets=attention, heads={attention: 4})
    assert [group.heads for group in report.groups if group.heads] == [(4, 2)] * 2


def labels_loss(model, batch):
    return nn.functional.cross_entropy(model(batch).mean((2, 3)), torch.arange(len(batch)) % 8)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Softplus(), nn.Conv2d(32, 8, 1)).eval()
    for channel in range(0, 32, 2):  # Half of the channels are hardly made and hardly read.
        model[0].weight.data[channel] *= 1e-3
        model[2].weight.data[:, channel] *= 1e-3
    images = torch.randn(12, 8, 6, 6)
    report = prune_structured(
        model, images, sparsity=0.5, method=method, calibration=[images], loss=labels_loss
    )
    first = report.groups[0]
    assert (report.method, first.layers, first.after) == (method, ("0",), 16)
    if method != "random":
        assert first.kept == tuple(range(1, 32, 2))


def test_a_channel_is_worth_all_the_weights_it_takes_with_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    made, read = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    report = prune_structured(model, torch.randn(3, 8), sparsity=0.5, round_to=1)
    worth = made.abs().sum(1) + read.abs().sum(0)
    assert set(report.groups[0].kept) == set(worth.argsort()[16:].tolist())
    kept = list(report.groups[0].kept)
    assert torch.equal(model[0].weight, made[kept])
    assert torch.equal(model[2].weight, read[:, kept])


@pytest.mark.parametrize(
    ("width", "sparsity", "round_to", "left"),
    [(64, 0.5, 16, 32), (64, 0.3, 16, 48), (64, 0.9, 16, 16), (48, 0.3, 1, 34), (20, 0.5, 8, 16)],
)
def test_what_is_left_is_rounded_up(width, sparsity, round_to, left):
    model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
    x = torch.randn(3, 8)
    report = prune_structured(model, x, sparsity=sparsity, round_to=round_to)
    assert report.groups[0].after == model[0].out_features == model[1].in_features == left


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, groups=2)
        self.norm = nn.GroupNorm(4, 32)
        self.mix = nn.Conv2d(32, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.after = nn.Conv2d(32, 32, 1)
        self.flat = nn.Linear(32 * 4, 8)
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.free = nn.Parameter(torch.randn(8))
        self.output = nn.Linear(8, 4)

    def forward(self, x):
        x = self.mix(torch.relu(self.norm(self.conv(x))))
        x = self.after(torch.relu(self.depthwise(x)))
        x = self.tied(self.flat(x.flatten(1)))
        return self.output(self.tied_too(x) + self.free)


def test_what_must_stay_stays_and_the_report_says_why():
    torch.manual_seed(0)
    model = Shared().train()
    model.mix.weight.requires_grad_(False)
    dense, x = copy.deepcopy(model), torch.randn(2, 8, 6, 6)
    report = prune_structured(model, x, sparsity=0.5, round_to=4)
    found = {group.layers[0]: group for group in report.groups}
    assert "ties them together" in found["conv"].reason
    assert "shares a parameter" in found["flat"].reason
    assert "outputs of the model" in found["output"].reason
    cut = {name for name, group in found.items() if group.after < group.before}
    assert cut == {"mix", "after"} or cut == {"depthwise", "after"}
    assert model.depthwise.groups == model.depthwise.out_channels == model.after.in_channels == 16
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["mix.weight"]
    # The flattened image: 4 columns to a channel.
    dropped = sorted(set(range(32)) - set(found["after"].kept))
    columns = [4 * channel + pixel for channel in dropped for pixel in range(4)]
    dense.flat.weight.data[:, columns] = 0
    (middle,) = cut - {"after"}
    dropped = sorted(set(range(32)) - set(found[middle].kept))
    dense.after.weight.data[:, dropped] = 0
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_said_on_the_way(capfd):
    model, inputs = bert()
    model.embeddings.free = nn.Parameter(torch.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_structured(model, inputs, sparsity=0.5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.0}, "sparsity must be above 0 and below 1, got 0.0"),
        ({"sparsity": 1.0}, "sparsity must be above 0 and below 1, got 1.0"),
        ({"sparsity": float("nan")}, "sparsity must be above 0 and below 1, got nan"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"method": "guess"}, "unknown method 'guess'; known are .*magnitude"),
        ({"method": "wanda"}, "method 'wanda' needs calibration data"),
        ({"targets": "trunk.*"}, r"targets: 'trunk\.\*' matches no layer"),
        ({"heads": {"trunk.*": 2}}, r"heads: 'trunk\.\*' matches no layer"),
        ({"ignore": "*"}, "nothing can be cut .*ignore= names stem.0"),
        ({"round_to": 64}, "nothing can be cut .*what would be left of 64 is no multiple of 64"),
        ({"example_inputs": torch.rand(1, 3, 8, 8)}, "the dependency graph cannot follow"),
        ({"example_inputs": 3}, "example_inputs: batch 0 is a int"),
    ],
)
def test_refusals_leave_the_model_as_it_is(arguments, message):
    model, images = resnet()
    before = copy.deepcopy(model.state_dict())
    given = {"example_inputs": images, "sparsity": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        prune_structured(model, given.pop("example_inputs"), **given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in model.modules())


class Fixed(nn.Module):
    """Its forward depends on the width of a layer, which the graph does not see."""

    def __init__(self, wrong):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 8)
        self.wrong = wrong

    def forward(self, x):
        x = self.first(x)
        assert self.wrong != "raises" or x.shape[-1] == 32
        y = self.second(x)
        return y[:, : x.shape[-1] // 4] if self.wrong == "shape" else y


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("raises", "does not run any more with its channels cut"),
        ("shape", r"instead of \[\[2, 8\]\]"),
    ],
)
def test_a_model_that_breaks_is_given_back_whole(wrong, message):
    model = Fixed(wrong).train()
    weights, x = list(model.parameters()), torch.randn(2, 8)
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        prune_structured(model, x, sparsity=0.5)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert torch.equal(model(x), expected)
    assert model.first.out_features == 32
    assert model.training


class OneProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.output = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.down(torch.relu(self.up(self.output(x))))


def test_heads_of_one_projection_stay():
    report = prune_structured(OneProjection(), torch.randn(2, 5, 32), sparsity=0.5)
    reasons = {group.layers[0]: group.reason for group in report.groups}
    assert "from a layer each" in reasons["qkv"]
    assert {n for n, reason in reasons.items() if not reason} == {"output", "up"}


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.output = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        x = self.query(x)
        rotated = torch.cat((-x[..., 16:], x[..., :16]), dim=-1)
        return self.output(0.6 * x + 0.8 * rotated)


def test_rotary_embeddings_are_refused_at_once():
    with pytest.raises(ValueError, match=r"cannot follow this model .*rotates channels"):
        prune_structured(Rotary(), torch.randn(2, 8), sparsity=0.5)


def test_without_the_library_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"torch-pruning.*sparsekit-kernels\[prune\]"):
        prune_structured(nn.Linear(8, 8), torch.randn(1, 8), sparsity=0.5)
