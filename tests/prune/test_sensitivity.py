"""`sensitivity`: what it measures, that it changes nothing, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekit.prune import SensitivityReport, prune, sensitivity


class Fragile(nn.Module):
    """Blocks in a row; one of them carries the output almost alone."""

    def __init__(self, fragile: int = 1, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(blocks)
        )
        self.norm = nn.BatchNorm1d(16)
        with torch.no_grad():
            self.blocks[fragile][2].weight *= 30

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def batches(count: int = 3) -> list[Tensor]:
    make = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=make) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fragile", [0, 1, 2])
def test_the_fragile_layer_is_first(fragile):
    report = sensitivity(Fragile(fragile), ["2:4", "1:4"], batches(), progress=False)
    assert f"blocks.{fragile}.2" == report.layers[0]
    for name in report.layers:
        assert 0 < report.loss(name, "2:4") < report.loss(name, "1:4")
    assert str(report).index(report.layers[0]) < str(report).index(report.layers[1])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("by", ["output", "loss", "evaluate"])
def test_the_model_is_what_it_was_bit_for_bit(method, by):
    model = Fragile()
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = state(model)
    extra = {
        "output": {},
        "loss": {"loss": lambda m, x: m(x).square().mean()},
        "evaluate": {"evaluate": lambda m: float(m(batches()[0]).mean())},
    }[by]
    report = sensitivity(
        model, ["2:4", "bsr4x4@0.5"], batches(), method=method, progress=False, **extra
    )
    assert len(report.rows) == 12
    assert report.measure == {"output": "relative_mse"}.get(by, by)
    assert same(before, state(model))
    assert modes == [module.training for module in model.modules()]
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_an_error_puts_the_weight_back():
    model, calls = Fragile(), []

    def evaluate(_: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no data")
        return 0.0

    before = state(model)
    with pytest.raises(RuntimeError, match="no data"):
        sensitivity(model, "2:4", evaluate=evaluate, progress=False)
    assert same(before, state(model))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_each_row_is_what_pruning_that_layer_alone_does(method):
    data = batches()
    report = sensitivity(Fragile(), ["2:4", "2:4v4"], data, method=method, progress=False)
    with torch.no_grad():
        expected = [Fragile().eval()(x) for x in data]
        for row in report.rows:
            model = Fragile().eval()
            prune(model, row.pattern, method, data, targets=row.layer, progress=False)
            zeros = float((model.get_submodule(row.layer).weight == 0).float().mean())
            errors = [
                float((model(x) - y).square().mean() / y.square().mean())
                for x, y in zip(data, expected, strict=True)
            ]
            # The blocks before it are played back from what they put out.
            assert row.loss == pytest.approx(sum(errors) / 3, rel=1e-4)
            assert row.sparsity == pytest.approx(zeros)


@pytest.mark.parametrize("method", ["taylor", "random", "fpgm"])
def test_statistics_of_the_dense_model_are_used(method):
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    data = batches()
    report = sensitivity(
        Fragile(), ["1:4", "2:4"], data, method=method, loss=loss, seed=3, progress=False
    )
    for row in report.rows[-4:]:
        model = Fragile().eval()
        prune(model, row.pattern, method, data, row.layer, progress=False, loss=loss, seed=3)
        with torch.no_grad():
            after = sum(float(loss(model, x)) for x in data) / 3
        assert row.loss == pytest.approx(after - report.dense, rel=1e-3, abs=1e-3)


def test_finished_blocks_are_not_computed_again():
    model, runs = Fragile(blocks=6), []
    model.blocks[0][1].register_forward_hook(lambda *_: runs.append(1))
    sensitivity(model, "2:4", batches(2), progress=False)
    # Without playback each of the 12 layers would run it for 2 batches, twice.
    assert len(runs) < 20


def test_evaluate_sees_the_model_itself_and_not_what_blocks_put_out_before():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))

    def evaluate(model: nn.Module) -> float:
        return -float(model(x).square().sum())

    for method in ("magnitude", "wanda"):
        report = sensitivity(
            Fragile(), "1:4", batches(), evaluate=evaluate, method=method, progress=False
        )
        with torch.no_grad():
            dense = evaluate(Fragile().eval())
        assert report.dense == pytest.approx(dense)
        for row in report.rows:
            model = Fragile().eval()
            prune(model, "1:4", method, batches(), targets=row.layer, progress=False)
            with torch.no_grad():
                assert row.loss == pytest.approx(dense - evaluate(model), rel=1e-4, abs=1e-3)


def test_a_loss_takes_batches_of_any_kind():
    make = torch.Generator().manual_seed(0)
    pairs = [(x, torch.randint(0, 16, (32,), generator=make)) for x in batches()]
    report = sensitivity(
        Fragile(),
        "2:4",
        iter(pairs),
        loss=lambda model, pair: cross_entropy(model(pair[0]), pair[1]),
        progress=False,
    )
    with torch.no_grad():
        dense = sum(float(cross_entropy(Fragile().eval()(x), y)) for x, y in pairs) / 3
        model = Fragile().eval()
        prune(model, "2:4", targets="blocks.2.2", progress=False)
        pruned = sum(float(cross_entropy(model(x), y)) for x, y in pairs) / 3
    assert report.dense == pytest.approx(dense, rel=1e-5)
    assert report.loss("blocks.2.2", "2:4") == pytest.approx(pruned - dense, rel=1e-2)


def test_kl_and_fewer_batches():
    data = batches()
    report = sensitivity(
        Fragile(), "2:4", data, distance="kl", scan_batches=1, targets="blocks.2.0", progress=False
    )
    model = Fragile().eval()
    prune(model, "2:4", targets="blocks.2.0", progress=False)
    with torch.no_grad():
        p, q = Fragile().eval()(data[0]).log_softmax(-1), model(data[0]).log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert report.rows[0].loss == pytest.approx(expected, rel=1e-4)
    assert report.measure == "kl"


# --- the report -------------------------------------------------------------------------------


def test_the_report_can_be_stored():
    report = sensitivity(Fragile(), ["2:4", "bsr4x4@0.7"], batches(1), progress=False)
    again = SensitivityReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.loss("blocks.0.0", "bsr4x4@0.7") == report.loss("blocks.0.0", "bsr4x4@0.7")
    with pytest.raises(
        ValueError, match=r"'blocks\.0\.0' was not measured with 1:4, but with 2:4, "
    ):
        report.loss("blocks.0.0", "1:4")


@pytest.mark.parametrize("spoil", [lambda d: d.pop("rows"), lambda d: d["rows"][0].pop("loss")])
def test_what_is_no_report_is_refused(spoil):
    values = sensitivity(Fragile(), "2:4", batches(1), progress=False).to_dict()
    spoil(values)
    with pytest.raises(ValueError, match=r"expected what SensitivityReport\.to_dict gave"):
        SensitivityReport.from_dict(values)


def test_plot(tmp_path: Path):
    report = sensitivity(Fragile(), ["2:4", "1:4"], batches(1), progress=False)
    report.plot(tmp_path / "losses.svg")
    drawn = (tmp_path / "losses.svg").read_text()
    assert "<!-- blocks.1.2 -->" in drawn
    assert "<!-- 1:4 -->" in drawn


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = SensitivityReport("magnitude", "kl", ())
    with pytest.raises(ImportError, match=r"pip install \"sparsekit-kernels\[demo\]\""):
        report.plot("never.png")


def test_layers_that_are_not_tried_are_named():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.idle = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.stem(x))

    report = sensitivity(Model(), "2:4", [torch.randn(2, 3, 8, 8)], progress=False)
    assert report.layers == ["body"]
    assert report.skipped["idle"] == "no calibration batch runs it"
    assert "a filter reads 3 input channels" in report.skipped["stem"]
    assert "stem: not tried, a filter reads 3" in str(report)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": None}, "nothing to measure by; pass evaluate=.*or calibration=batches"),
        ({"distance": "far"}, "unknown distance 'far'; known are cosine, kl, relative_mse"),
        ({"scan_batches": 0}, "scan_batches must be at least 1, got 0"),
        ({"patterns": []}, "no patterns to try; pass at least one"),
        ({"method": "best"}, "unknown method 'best'"),
        ({"calibration": None, "evaluate": len, "method": "wanda"}, "needs calibration data"),
        ({"targets": "nothing"}, "'nothing' matches no layer"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(
            Fragile(),
            **{"patterns": "2:4", "calibration": batches(), "progress": False} | arguments,
        )


def test_an_output_without_a_tensor_is_refused():
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> str:
            return str(super().forward(x))

    with pytest.raises(ValueError, match=r"the model returns a str.*pass evaluate= or loss="):
        sensitivity(Odd(nn.Linear(16, 16)), "2:4", batches(), progress=False)


def test_a_weight_with_nan_is_refused():
    model = Fragile()
    with torch.no_grad():
        model.blocks[0][0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight of 'blocks\.0\.0' holds 1 NaN"):
        sensitivity(model, "2:4", batches(), progress=False)
