"""`plan_latency`: the least loss for a budget, from made-up times; nothing is timed here."""

from __future__ import annotations

import itertools
import random
import sys

import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit import gate
from sparsekit.gate import Verdict
from sparsekit.patterns import exactly, match, parse_pattern, resolve_pattern
from sparsekit.prune import SensitivityReport, plan_latency, sensitivity
from sparsekit.prune.allocation import latency
from sparsekit.prune.allocation.latency import LatencyPlan, LayerOption, PlannedLayer, least_loss
from sparsekit.prune.allocation.scan import SensitivityRow
from sparsekit.workload import Workload

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
SPEED = {"2:4": 1.5, "2:4v4": 2.0, "bsr16x16@0.75": 4.0, "1:4": 0.5}
MODEL_MS = 10.0


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense layer takes a microsecond for each row and output, the model ten milliseconds."""

    def fake(workload: Workload) -> Verdict:
        dense = workload.rows * workload.packed.matrix_shape[0] / 1e3
        speed = SPEED[str(workload.packed.pattern)]
        return Verdict(dense, dense / speed, speed, "torch", workload.kernel)

    monkeypatch.setattr(gate, "measure", fake)
    monkeypatch.setattr(latency, "_model_ms", lambda model, example_inputs: MODEL_MS)


class Model(nn.Module):
    """`twice` runs two times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 128)
        self.twice = nn.Linear(128, 128)
        self.last = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x))))))


DENSE_MS = {"first": 0.512, "twice": 1.024, "last": 0.128}


def losses(**of: float) -> SensitivityReport:
    """Of each layer under 2:4; more under the others."""
    rows = tuple(
        SensitivityRow(name, spelling, 0.5, factor * of.get(name, 1.0))
        for name in DENSE_MS
        for spelling, factor in {"2:4": 1, "2:4v4": 1.5, "bsr16x16@0.75": 3, "1:4": 2}.items()
    )
    return SensitivityReport("magnitude", "evaluate", rows)


def planned(model: nn.Module | None = None, **options) -> LatencyPlan:
    given = {"candidates": list(SPEED), "losses": losses(), "progress": False} | options
    return plan_latency(Model() if model is None else model, X, **given)


# --- the solver -------------------------------------------------------------------------------


def brute_force(rows, limits):
    best = None
    for chosen in itertools.product(*(range(len(row)) for row in rows)):
        if all(
            sum(row[i] for row, i in zip(costs, chosen, strict=True)) <= most
            for costs, most in limits
        ):
            total = sum(row[i] for row, i in zip(rows, chosen, strict=True))
            if best is None or total < best[0]:
                best = (total, list(chosen))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_solver_finds_what_trying_everything_finds(seed):
    random_ = random.Random(seed)
    scale = 10.0 ** random_.randint(-8, 3)
    sizes = [random_.randint(1, 5) for _ in range(random_.randint(1, 6))]
    rows = [[scale * random_.uniform(-0.2, 1) for _ in range(size)] for size in sizes]
    limits = []
    for _ in range(random_.randint(1, 2)):
        costs = [[random_.uniform(0.001, 9) for _ in range(size)] for size in sizes]
        low, high = sum(map(min, costs)), sum(map(max, costs))
        limits.append((costs, low + (high - low) * random_.uniform(0.2, 0.9)))
    expected = brute_force(rows, limits)
    if expected is None:  # each limit can be met, but not both at once
        with pytest.raises(ValueError, match="no choice meets both budgets"):
            least_loss(rows, limits)
    else:
        assert least_loss(rows, limits) == expected[1]


def test_nothing_to_choose():
    assert least_loss([], []) == []


# --- the plan ---------------------------------------------------------------------------------


def test_the_plan_of_a_budget_is_the_best_of_all():
    rows = [(1.0, 1.5, 3.0), (1.0, 1.5, 3.0), (1.0, 1.5, 3.0)]
    weight = {"first": 0.3, "twice": 1.0, "last": 0.2}
    for budget in (9.9, 9.5, 9.2, 9.0, 8.9):
        plan = planned(losses=losses(**weight), budget_ms=budget)
        times = [[ms, ms / 1.5, ms / 2, ms / 4] for ms in DENSE_MS.values()]
        costs = [[0.0, *(weight[n] * f for f in row)] for n, row in zip(weight, rows, strict=True)]
        total, chosen = brute_force(costs, [(times, budget - MODEL_MS + sum(DENSE_MS.values()))])
        assert [layer.chosen for layer in plan.layers] == chosen
        assert plan.loss == pytest.approx(total)
        assert plan.model_ms <= budget + 1e-9


def test_times_count_calls_and_losing_patterns_are_not_offered():
    plan = planned(budget_ratio=1.0)
    assert {layer.name: layer.dense.ms for layer in plan.layers} == pytest.approx(DENSE_MS)
    for layer in plan.layers:
        assert [str(option.pattern) for option in layer.options] == ["None", *list(SPEED)[:3]]
        speeds = [layer.dense.ms / option.ms for option in layer.options]
        assert speeds == pytest.approx([1, 1.5, 2, 4])
        assert layer.options[1].kernel.startswith("matmul_nm")
    assert dict(plan) == dict.fromkeys(DENSE_MS)
    assert plan.model_ms == MODEL_MS


def test_a_ratio_is_of_the_dense_model():
    assert planned(budget_ratio=0.9).budget_ms == pytest.approx(9.0)
    assert dict(planned(budget_ratio=0.9)) == dict(planned(budget_ms=9.0))


def test_the_fragile_layer_is_spared_where_the_budget_allows():
    saved = DENSE_MS["first"] / 2
    plan = planned(losses=losses(twice=100.0), budget_ms=MODEL_MS - saved)
    assert plan["twice"] is None
    assert plan["first"] is not None


def test_a_budget_of_bytes_offers_what_loses_too():
    dense = sum(layer.dense.nbytes for layer in planned(budget_ms=10).layers)
    assert dense == 4 * (64 * 128 + 128 * 128 + 128 * 32)
    smallest = {
        layer.name: min(option.nbytes for option in layer.options)
        for layer in planned(budget_bytes=dense).layers
    }
    plan = planned(budget_bytes=sum(smallest.values()))
    assert plan.nbytes == sum(smallest.values())
    loser = next(o for o in plan.layers[0].options if str(o.pattern) == "1:4")
    assert loser.ms == plan.layers[0].dense.ms
    assert loser.nbytes < plan.layers[0].dense.nbytes / 2


def test_both_budgets_hold():
    dense = sum(layer.dense.nbytes for layer in planned(budget_ms=10).layers)
    plan = planned(budget_ms=9.2, budget_bytes=int(0.6 * dense))
    assert plan.model_ms <= 9.2 + 1e-9
    assert plan.nbytes <= 0.6 * dense
    alone = planned(budget_ms=9.2)
    assert alone.nbytes > 0.6 * dense or plan.loss == alone.loss


def test_frontier_goes_from_the_fastest_to_dense():
    plan = planned(budget_ratio=0.95, losses=losses(first=0.3, last=0.1))
    plans = plan.frontier(12)
    assert len(plans) > 3
    assert plans[0].layers_ms == pytest.approx(sum(DENSE_MS.values()) / 4)
    assert set(plans[-1].values()) == {None}
    for faster, slower in itertools.pairwise(plans):
        assert faster.loss > slower.loss
        assert faster.model_ms < slower.model_ms
    by_size = planned(budget_bytes=10**6).frontier(5)
    assert by_size[0].nbytes < by_size[-1].nbytes
    assert set(by_size[-1].values()) == {None}


def test_losses_are_measured_where_patterns_win(monkeypatch):
    asked = []

    def seen(model, patterns, *args, **options):
        asked.append((list(map(str, patterns)), options["targets"]))
        return sensitivity(model, patterns, *args, **options)

    monkeypatch.setattr(latency, "sensitivity", seen)
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = planned(model, losses=None, calibration=[X], budget_ratio=0.93)
    assert asked == [(["2:4", "2:4v4", "bsr16x16@0.75"], list(DENSE_MS))]
    report = sensitivity(model, "2:4", [X], progress=False)
    for layer in plan.layers:
        assert layer.options[1].loss == report.loss(layer.name, "2:4")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model.first) is nn.Linear


def test_the_plan_goes_into_prune_and_convert():
    model = Model()
    plan = planned(model, losses=losses(first=10.0), budget_ratio=0.93)
    assert plan["first"] is None
    sk.prune(model, plan, progress=False)
    report = sk.convert(model, plan, X, progress=False)
    for row in report.rows:
        chosen = plan[row.layer]
        assert row.verdict == ("dense" if chosen is None else "sparse")
        assert row.pattern == (None if chosen is None else str(chosen))
    converted = {row.layer: row.sparse_ms for row in report.rows if row.verdict == "sparse"}
    assert converted
    for layer in plan.layers:
        if layer.name in converted:
            assert converted[layer.name] == pytest.approx(layer.choice.ms)


@pytest.mark.parametrize("name", ["a*", "a[0]", "what?", "re:a.*", "plain"])
def test_names_stand_for_themselves(name):
    expression = exactly(name)
    assert match(name, expression)
    for other in ("ab", "a0", "what!", "a.b", "re:ab", "e:a.*", "plai", "r"):
        assert not match(other, expression)


def test_layers_with_odd_names_get_their_own_pattern():
    model = nn.Module()
    for name in ("a*", "ab", "re:a", "a[b]"):
        model.add_module(name, nn.Linear(16, 16))
    choices = dict(zip(("a*", "ab", "re:a", "a[b]"), ("2:4", "1:4", "4:8", "2:8"), strict=True))
    layers = tuple(
        PlannedLayer(
            name,
            (LayerOption(None, 1.0, 1), LayerOption(parse_pattern(pattern), 0.5, 1)),
            1,
        )
        for name, pattern in choices.items()
    )
    plan = LatencyPlan(layers, 5.0)
    for name, pattern in choices.items():
        assert str(resolve_pattern(name, plan)) == pattern
    report = sk.prune(model, plan, progress=False)
    assert {layer.name: layer.pattern for layer in report.layers} == choices


def test_layers_without_a_choice_are_named():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)
            self.stem = nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.stem(x.reshape(1, 1, 16, 16).expand(1, 3, 16, 16))
            return self.used(x)

    rows = (SensitivityRow("used", "2:4", 0.5, 1.0),)
    plan = plan_latency(
        Two(),
        X,
        ["2:4"],
        budget_ratio=0.995,
        losses=SensitivityReport("magnitude", "evaluate", rows),
        progress=False,
    )
    assert [layer.name for layer in plan.layers] == ["used"]
    assert sorted(plan.left_dense) == ["idle", "stem"]
    assert plan.left_dense["idle"] == "it did not run on the example inputs"
    assert "a filter reads 3 input channels" in plan.left_dense["stem"]
    assert "2 more layers stay dense" in str(plan)


def test_printing():
    text = str(planned(budget_ms=9.0))
    assert "model 10.000 ms dense, 8." in text or "model 10.000 ms dense, 9.000" in text
    for name in DENSE_MS:
        assert f"│ {name} " in text


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no budget; pass budget_ms=, budget_ratio= .* or budget_bytes="),
        ({"budget_ms": 9.0, "budget_ratio": 0.9}, "budget_ms= or budget_ratio=, not both"),
        ({"budget_ratio": 0.0}, "budget_ratio must be greater than 0, got 0.0"),
        ({"budget_bytes": -1}, "budget_bytes must be greater than 0, got -1"),
        ({"budget_ms": 9.0, "candidates": []}, "no candidates"),
        ({"budget_ms": 9.0, "losses": None}, "nothing says what a pruned layer costs"),
        (
            {"budget_ms": 8.0},
            r"cannot take at most 8 ms; with these candidates it reaches 8.752 ms, 87.5% of dense",
        ),
        ({"budget_bytes": 100}, r"cannot take at most 100 bytes; .* they reach \d+"),
        (
            {"budget_ms": 9.0, "losses": SensitivityReport("magnitude", "kl", ())},
            "layer 'first' was not measured with 2:4, but with nothing",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        planned(**options)


def test_a_frontier_has_two_points():
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        planned(budget_ms=9.0).frontier(1)


def test_without_scipy_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install \"sparsekit-kernels\[prune\]\""):
        planned(budget_ms=9.0)


def test_times_that_cannot_be_are_told(monkeypatch):
    monkeypatch.setattr(latency, "_model_ms", lambda model, example_inputs: 1.0)
    with pytest.warns(UserWarning, match=r"the dense layers take 1\.664 ms, the whole model 1 ms"):
        planned(budget_ratio=1.0)


def test_where_nothing_wins_dense_is_the_plan(monkeypatch):
    for spelling in SPEED:
        monkeypatch.setitem(SPEED, spelling, 0.9)
    plan = planned(budget_ratio=1.0)
    assert set(plan.values()) == {None}
    with pytest.raises(ValueError, match=r"it reaches 10 ms, 100.0% of dense"):
        planned(budget_ratio=0.9)
