"""`prune` on small models: every method and pattern, order, refusals, the report."""

import copy
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from sparsekit.patterns import parse_pattern
from sparsekit.prune import METHODS, RECONSTRUCTIONS, prune
from sparsekit.prune.calibration import Calibration

PATTERNS = ["2:4", "1:4", "4:8", "2:4v4", "1:4v16", "bsr1x1@0.7", "bsr4x4@0.5", "bsr16x1@0.5"]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 12))


def batches_of(count=3, width=24):
    make = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=make)
    return [torch.randn(64, width, generator=make) @ mix for _ in range(count)]


def square(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("spelling", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_fit_the_pattern(method, spelling, calibrated):
    if METHODS[method].needs_calibration and not calibrated:
        with pytest.raises(ValueError, match="needs calibration"):
            prune(small(), spelling, method)
        return
    model, dense = small(), small()
    data = batches_of() if calibrated else None
    report = prune(model, spelling, method, calibration=data, progress=False, loss=square)
    pattern = parse_pattern(spelling)
    assert list(report.masks) == ["0", "2"]
    for name, mask in report.masks.items():
        weight = model.get_submodule(name).weight
        assert pattern.first_violation(weight != 0) is None
        assert torch.equal(weight != 0, mask)
        assert torch.equal(model.get_submodule(name).bias, dense.get_submodule(name).bias)
    for layer in report.layers:
        assert layer.pattern == spelling
        assert (layer.error is not None) == calibrated
        kept = report.masks[layer.name].float().mean()
        assert layer.sparsity == pytest.approx(1 - float(kept))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_weights(method):
    first, second = small(), small()
    for model in (first, second):
        torch.rand(1)  # torch's own generator plays no part
        prune(model, "2:4v4", method, calibration=batches_of(), progress=False, loss=square)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_better_methods_change_the_output_less():
    x = torch.cat(batches_of())

    def distance(method, **options):
        model, dense = small(), small()
        prune(model, "2:4", method, calibration=batches_of(), progress=False, **options)
        with torch.no_grad():
            return float((model(x) - dense(x)).norm())

    exact = distance("sparsegpt", reconstruction="least_squares")
    assert exact < distance("sparsegpt") < distance("wanda")
    assert distance("wanda", reconstruction="sweep") < distance("wanda")
    assert distance("magnitude", reconstruction="sweep") < distance("magnitude")


def test_later_layers_are_calibrated_on_pruned_inputs():
    model, batches = small(), batches_of()
    report = prune(model, "2:4", "sparsegpt", calibration=batches, progress=False)
    # The reported error of the last layer holds for the inputs the pruned first layer makes.
    x = torch.relu(model[0](torch.cat(batches))).detach()
    dense, pruned = small()[2].weight.detach(), model[2].weight.detach()
    on_pruned = ((dense - pruned) @ x.t()).norm() / (dense @ x.t()).norm()
    assert report.layers[1].error == pytest.approx(float(on_pruned), rel=1e-3)
    x = torch.relu(small()[0](torch.cat(batches))).detach()
    on_dense = ((dense - pruned) @ x.t()).norm() / (dense @ x.t()).norm()
    assert report.layers[1].error != pytest.approx(float(on_dense), rel=1e-3)


def test_a_generator_of_every_kind_of_batch_gives_the_same():
    kinds = [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}]
    weights = []
    for kind in kinds:
        model = small()
        prune(model, "2:4", "wanda", calibration=(kind(x) for x in batches_of()), progress=False)
        weights.append(model[2].weight.detach())
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_one_second_moment_is_alive_at_a_time(monkeypatch):
    alive, most = weakref.WeakSet(), []
    moment = Calibration.moments

    def counted(self, group):
        most.append(len(alive))  # Before the next one is made.
        out = moment(self, group)
        alive.add(out)
        return out

    monkeypatch.setattr(Calibration, "moments", counted)
    prune(small(), "2:4", "sparsegpt", calibration=batches_of(), progress=False)
    assert most == [0, 0]


@pytest.mark.parametrize(
    "first", ["import sparsekit", "import sparsekit.prune", "import sparsekit.prune.api"]
)
def test_the_package_is_callable_whatever_is_imported_first(first):
    code = (
        f"{first}; import inspect; import sparsekit.prune as package;"
        "import sparsekit; assert sparsekit.prune is package;"
        "assert inspect.signature(sparsekit.prune) == inspect.signature(package.prune);"
        "import torch; model = torch.nn.Sequential(torch.nn.Linear(8, 8));"
        "assert list(sparsekit.prune(model, '2:4', progress=False).masks) == ['0']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_low_precision_weights_keep_their_dtype():
    model = small().bfloat16()
    data = [x.bfloat16() for x in batches_of()]
    report = prune(model, "2:4", "sparsegpt", calibration=data, progress=False)
    assert model[0].weight.dtype == torch.bfloat16
    assert all(layer.error < 0.7 for layer in report.layers)


# --- which layers -----------------------------------------------------------------------------


def test_targets_ignore_and_patterns_by_name():
    model = small()
    assert list(prune(model, "2:4", targets="2", progress=False).masks) == ["2"]
    assert list(prune(small(), "2:4", ignore="re:[12]", progress=False).masks) == ["0"]
    report = prune(small(), {"0": "1:4", "*": "2:4v4"}, progress=False)
    assert [layer.pattern for layer in report.layers] == ["1:4", "2:4v4"]
    assert list(prune(small(), {"0": None, "*": "2:4"}, progress=False).masks) == ["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": "nothing*"},
            "targets: 'nothing\\*' matches no layer; the layers are '0', '2'",
        ),
        ({"pattern": {"x": "2:4"}}, "pattern: 'x' matches no layer"),
        ({"ignore": "*"}, "no nn.Linear, nn.Conv1d or nn.Conv2d that targets and ignore leave"),
        ({"pattern": {"0": None}}, "no layer can be pruned"),
        ({"pattern": "3:5"}, "m must be one of"),
        (
            {"method": "best"},
            "unknown method 'best'; known are admm, fisher, fpgm, magnitude,",
        ),
        (
            {"reconstruction": "magic"},
            "unknown reconstruction 'magic'; known are admm, least_squares",
        ),
        ({"method": "wanda"}, "method 'wanda'.* needs calibration"),
        ({"reconstruction": "sweep"}, "reconstruction 'sweep' needs calibration"),
        ({"method": "wanda", "calibration": []}, "gave no batches"),
        ({"calibration": torch.zeros(2, 24)}, "expected an iterable of batches"),
        ({"dampening": -1.0}, "dampening must be greater than 0"),
    ],
)
def test_refusals_leave_the_model_as_it_is(arguments, message):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, **({"pattern": "2:4", "progress": False} | arguments))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_before_anything_changes(value):
    model = small()
    with torch.no_grad():
        model[2].weight[3, 3] = value
    first = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="weight of '2' holds 1 NaN or infinite"):
        prune(model, "2:4", progress=False)
    assert torch.equal(model[0].weight, first)


def test_an_empty_weight_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.empty(0, 4))
    with pytest.raises(ValueError, match=r"weight of '1' is empty \[0, 4\]"):
        prune(model, "2:4", progress=False)


def test_inputs_too_alike_are_named():
    model, x = small().double(), torch.ones(64, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"inputs of layer '0' are too alike.*dampening=1e-30"):
        prune(model, "2:4", "sparsegpt", calibration=[x], dampening=1e-30, progress=False)
    prune(model, "2:4", "wanda", calibration=[x], dampening=1e-30, progress=False)  # no inverse


def test_an_error_on_the_way_gives_the_model_back_in_order():
    model = small().train()
    batches = batches_of()
    batches[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match="inputs of layer '0' hold NaN"):
        prune(model, "2:4", "wanda", calibration=batches, progress=False)
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_weight_two_layers_share_is_pruned_once_for_both_inputs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = Tied()
    report = prune(model, "2:4", "wanda", calibration=batches_of(width=8), progress=False)
    assert list(report.masks) == ["a"]
    assert model.b.weight is model.a.weight
    assert {layer.name: layer.reason for layer in report.layers}["b"].startswith(
        "shares its weight with a"
    )


def reasons_of(model, **arguments):
    report = prune(model, "2:4", progress=False, **arguments)
    return {layer.name: layer.reason for layer in report.layers if layer.pattern is None}


def test_a_head_tied_to_an_embedding_stays_dense():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = (
                nn.Embedding(16, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 16, bias=False),
            )
            self.head.weight = self.embed.weight

    model = Language()
    assert "tied to Embedding 'embed'" in reasons_of(model)["head"]
    assert bool((model.embed.weight != 0).all())


def test_weights_that_others_read_stay_dense():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8))
    reasons = reasons_of(model)
    assert "MultiheadAttention '0.self_attn'" in reasons["0.self_attn.out_proj"]
    assert "TransformerEncoderLayer '0'" in reasons["0.linear1"]
    assert set(reasons) == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}
    with pytest.raises(ValueError, match=r"no layer can be pruned .*fused path"):
        prune(layer, "2:4", progress=False)


def test_parametrised_layers_stay_dense():
    model = small()
    nn.utils.parametrizations.weight_norm(model[0])
    assert "parametrised" in reasons_of(model)["0"]


def test_masked_and_quantised_layers_stay_dense():
    model = small()
    l1_unstructured(model[0], "weight", 0.5)
    assert "computed from other parameters" in reasons_of(model)["0"]
    model = small()
    model[0].weight = nn.Parameter(torch.zeros(40, 24, dtype=torch.int8), requires_grad=False)
    assert "quantised already (Tensor, torch.int8)" in reasons_of(model)["0"]


def test_layers_no_batch_runs_stay_dense():
    model = small()
    model.register_module("unused", nn.Linear(4, 4))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    reasons = reasons_of(model, method="wanda", calibration=batches_of())
    assert reasons == {"unused": "no calibration batch runs it"}
    assert bool((model.unused.weight != 0).all())


def test_calibration_that_reaches_no_layer_is_refused():
    model = small()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"no calibration batch runs any of .* \('0', '2'\)"):
        prune(model, "2:4", calibration=batches_of(), progress=False)


def test_a_layer_that_runs_twice_under_two_names_is_calibrated_on_all_it_reads():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8, bias=False)
            self.b = self.a

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model, dense, x = Twice(), Twice().a.weight.detach(), torch.cat(batches_of(width=8))
    report = prune(model, "2:4", "wanda", batches_of(width=8), progress=False)
    assert [layer.name for layer in report.layers] == ["a"]
    norms = torch.cat([x, torch.relu(x @ dense.t())]).square().mean(0).sqrt()
    expected = parse_pattern("2:4").mask(dense.abs() * norms)
    assert torch.equal(report.masks["a"], expected)


@pytest.mark.parametrize(
    ("spelling", "kept"), [("bsr64x64@0.5", 1.0), ("2:4v16", 0.5), ("bsr16x16@0.9", 0.5)]
)
@pytest.mark.parametrize("method", METHODS)
def test_tiles_larger_than_the_layer(method, spelling, kept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 12))
    batches = batches_of(width=32)
    report = prune(model, spelling, method, batches, loss=square, progress=False)
    (layer,) = report.layers
    assert layer.sparsity == 1 - kept
    assert parse_pattern(spelling).first_violation(model[0].weight != 0) is None
    assert layer.reason == (f"{spelling} keeps all of it" if kept == 1 else "")


# --- too little calibration ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reconstruction"),
    [("sparsegpt", None), ("sparsegpt", "none"), ("taylor", "sweep"), ("wanda", "least_squares")],
)
def test_too_few_tokens_for_the_second_moment_are_named_once(method, reconstruction):
    options = {"reconstruction": reconstruction, "loss": square, "progress": False}
    few = [torch.cat(batches_of())[:30]]  # enough for the first layer only
    with pytest.warns(UserWarning, match=r"layer '2' saw 30 .* needs at least 40: damp") as caught:
        prune(small(), "2:4", method, few, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"'2' saw 10 .* least 40 \(1 more layers lack some too\)"):
        prune(small(), "2:4", method, [few[0][:10]], **options)
    prune(small(), "2:4", method, [torch.cat(batches_of())[:40]], **options)


@pytest.mark.parametrize(
    "method",
    [n for n, m in METHODS.items() if not m.correlations and m.reconstruction == "none"],
)
def test_methods_that_look_at_columns_one_by_one_need_no_such_number(method):
    prune(small(), "2:4", method, [batches_of()[0][:3]], loss=square, progress=False)


# --- the report -------------------------------------------------------------------------------


def test_the_report_prints_a_line_per_layer():
    report = prune(small(), "2:4", "wanda", calibration=batches_of(), progress=False)
    text = str(report)
    assert "wanda, reconstruction none: 2 layers pruned, 50.0% zeros" in text
    for layer in report.layers:
        assert f"{layer.shape[0]}x{layer.shape[1]}" in text
        assert f"{layer.error:.4f}" in text
    assert report.sparsity == 0.5
    values = json.loads(json.dumps(report.to_dict()))
    assert values["layers"][0]["shape"] == [40, 24]
    assert values["method"] == "wanda"


def test_progress_is_shown_only_when_asked(capsys):
    prune(small(), "2:4", progress=False)
    assert capsys.readouterr().err == ""
    prune(small(), "2:4")
    assert "prune (magnitude)" in capsys.readouterr().err


def test_every_reconstruction_is_known_by_name():
    assert set(RECONSTRUCTIONS) >= {"none", "sweep", "least_squares"}


def test_a_loss_runs_the_model_on_batches_of_any_kind():
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches_of()]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    by_loss, plain = small(), small()
    prune(by_loss, "2:4", "sparsegpt", calibration=labelled, loss=loss, progress=False)
    prune(plain, "2:4", "sparsegpt", calibration=batches_of(), progress=False)
    assert torch.equal(by_loss[2].weight, plain[2].weight)
