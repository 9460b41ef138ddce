"""Allocations: budgets met, and each one against its paper's formula or an obvious reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsekit.patterns import NM, BlockSparse, Pattern, parse_pattern
from sparsekit.prune import ALLOCATIONS, METHODS, OWL, Sensitivity, prune, sensitivity
from sparsekit.prune.allocation.allocate import fit
from sparsekit.prune.allocation.scan import SensitivityReport, SensitivityRow


class Small(nn.Module):
    """Linear layers and convolutions of different sizes; one needs padded taps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.odd = nn.Conv2d(16, 20, (1, 3), padding=(0, 1))
        self.hidden = nn.Linear(20, 48)
        self.output = nn.Linear(48, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.odd(torch.relu(self.grouped(torch.relu(self.conv(x))))))
        return self.output(torch.relu(self.hidden(x.mean((2, 3)))))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def images(count: int = 2) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, 6, 6, generator=make) for _ in range(count)]


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(sizes)))


def matrix_of(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    n, k = mask.shape[:2]
    taps = mask.reshape(n, k, -1).transpose(1, 2)
    if taps.shape[1] > 1:
        taps = nn.functional.pad(taps, (0, -k % pattern.k_tile))
    return taps.reshape(n, -1)


def kept_blocks(pattern: BlockSparse, masks: Mapping[str, torch.Tensor]) -> int:
    return sum(int(pattern.occupancy(matrix_of(mask, pattern)).sum()) for mask in masks.values())


# --- the budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["bsr1x1@0.7", "bsr4x4@0.6", "bsr4x8@0.5", "bsr16x1@0.6"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_blocks_meet_the_budget_to_the_block(allocation, spelling):
    pattern = parse_pattern(spelling)
    model = small()
    ignore = "grouped" if pattern.row_tile > 8 else None
    uniform = prune(model, pattern, progress=False, ignore=ignore)
    model = small()
    report = prune(
        model, pattern, calibration=images(), allocation=allocation, progress=False, ignore=ignore
    )
    kept = kept_blocks(pattern, report.masks)
    for layer in report.layers:
        if layer.pattern is None and layer.reason.startswith("its allocation"):
            whole = torch.ones(layer.shape, dtype=torch.bool)
            kept += kept_blocks(pattern, {layer.name: whole})
    assert kept == kept_blocks(pattern, uniform.masks)
    assert allocation == "uniform" or len({x.pattern for x in report.layers}) > 1


@pytest.mark.parametrize("spelling", ["2:4", "8:16", "4:8v4"])
@pytest.mark.parametrize("allocation", sorted(set(ALLOCATIONS) - {"uniform"}))
def test_n_of_m_never_exceeds_the_budget_and_misses_less_than_a_step(allocation, spelling):
    pattern = parse_pattern(spelling)
    report = prune(small(), pattern, calibration=images(), allocation=allocation, progress=False)
    kept, allowed, steps = 0, 0, []
    for layer in report.layers:
        rows, columns = matrix_of(torch.ones(layer.shape), pattern).shape
        step = -(-rows // pattern.vector) * -(-columns // pattern.m)
        n = pattern.m if layer.pattern is None else parse_pattern(layer.pattern).n
        kept, allowed, steps = kept + n * step, allowed + pattern.n * step, [*steps, step]
    assert allowed - max(steps) < kept <= allowed
    # With 4 steps, what is nearest may be 2:4 everywhere.
    assert pattern.m == 4 or len({layer.pattern for layer in report.layers}) > 1


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(2, 40), st.integers(1, 500)), min_size=1, max_size=8
    ),
    st.floats(0, 1),
)
def test_fit(layers, share):
    densities, steps, tiles = (list(column) for column in zip(*layers, strict=True))
    least = sum(tiles)
    most = sum(s * t for s, t in zip(steps, tiles, strict=True))
    kept = least + int(share * (most - least))
    counts = fit(densities, steps, tiles, kept)
    assert all(1 <= count <= s for count, s in zip(counts, steps, strict=True))
    left = kept - sum(count * t for count, t in zip(counts, tiles, strict=True))
    assert left >= 0
    assert left == 0 or left < max(t for c, s, t in zip(counts, steps, tiles, strict=True) if c < s)


def test_fit_keeps_densities_that_meet_the_budget_already():
    assert fit([42 / 49, 1 / 49, 30 / 49], [49, 49, 49], [1, 1, 1], 73) == [42, 1, 30]


def test_each_pattern_of_a_mapping_has_a_budget_of_its_own():
    model = mlp(32, 64, 16, 64, 32)
    patterns = {"[01]": "bsr4x4@0.5", "*": "bsr4x4@0.75"}
    report = prune(model, patterns, allocation="erk", progress=False)
    kept = [int(mask.sum()) // 16 for mask in report.masks.values()]
    assert sum(kept[:2]) == 192 // 2
    assert sum(kept[2:]) == 192 // 4
    assert kept[:2] != [64, 32]


def test_a_pattern_that_keeps_everything_is_left_alone():
    report = prune(mlp(8, 8, 8), "bsr4x4@0.0", allocation="erk", progress=False)
    assert [layer.pattern for layer in report.layers] == ["bsr4x4@0.0"] * 2


def test_a_layer_that_keeps_everything_stays_dense():
    model = mlp(4, 4, 200, 200)
    dense = model[0].weight.detach().clone()
    report = prune(model, "bsr1x1@0.5", allocation="erk", progress=False)
    assert list(report.masks) == ["2"]
    assert int(report.masks["2"].sum()) == (16 + 800 + 40000) // 2 - 16 - 800
    assert {layer.reason for layer in report.layers[1:]} == {"its allocation keeps all of it"}
    assert torch.equal(model[0].weight, dense)


# --- each allocation --------------------------------------------------------------------------


def test_erk_is_the_formula():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.Conv1d(16, 24, 5), nn.Linear(40, 60), nn.Linear(64, 64)
    )
    report = prune(model, "bsr1x1@0.9", allocation="erk", progress=False)
    raw = [
        (16 + 32 + 3 + 3) / (16 * 32 * 9),
        (16 + 24 + 5) / (16 * 24 * 5),
        (40 + 60) / (40 * 60),
        (64 + 64) / (64 * 64),
    ]
    sizes = [mask.numel() for mask in report.masks.values()]
    factor = 0.1 * sum(sizes) / sum(d * size for d, size in zip(raw, sizes, strict=True))
    for density, size, mask in zip(raw, sizes, report.masks.values(), strict=True):
        assert abs(int(mask.sum()) - factor * density * size) <= 1


def test_erk_fills_a_small_layer_and_shares_out_the_rest():
    model = mlp(8, 8, 128, 96)
    report = prune(model, "bsr1x1@0.8", allocation="erk", progress=False)
    # 64 weights would get more than 64: they stay, the others share what is left.
    assert list(report.masks) == ["1", "2"]
    kept = {name: int(mask.sum()) for name, mask in report.masks.items()}
    left = round(0.2 * 64) + round(0.2 * 1024) + round(0.2 * 128 * 96) - 64
    assert sum(kept.values()) == left
    assert kept["1"] == pytest.approx(left * (8 + 128) / (8 + 128 + 128 + 96), abs=1)


def test_global_keeps_what_sorting_all_blocks_would():
    model = mlp(24, 40, 32, 16)
    with torch.no_grad():
        model[1].weight.mul_(1.25)  # so that every layer keeps some
        model[2].weight.mul_(1.2)
    dense = {str(i): layer.weight.detach().clone() for i, layer in enumerate(model)}
    report = prune(model, "bsr4x8@0.6", allocation="global", progress=False)
    blocks = {
        name: weight.abs().unfold(0, 4, 4).unfold(1, 8, 8).sum((2, 3))
        for name, weight in dense.items()
    }
    best = torch.cat([each.flatten() for each in blocks.values()]).sort(descending=True).values
    budget = sum(round(0.4 * each.numel()) for each in blocks.values())
    for name, each in blocks.items():
        assert 1 < int((each >= best[budget - 1]).sum()) < each.numel()
        expected = (each >= best[budget - 1]).repeat_interleave(4, 0).repeat_interleave(8, 1)
        assert torch.equal(report.masks[name], expected)


def test_global_takes_the_scores_of_a_calibrated_method_from_the_dense_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    x = torch.randn(64, 16)
    with torch.no_grad():
        inputs = {"0": x, "2": model[:2](x)}
        scores = {
            name: (model.get_submodule(name).weight * each.square().mean(0).sqrt()).square()
            for name, each in inputs.items()
        }
    report = prune(
        model, "bsr1x1@0.5", "wanda", calibration=[x], allocation="global", progress=False
    )
    threshold = torch.cat([each.flatten() for each in scores.values()]).median()
    for name, each in scores.items():
        assert int(report.masks[name].sum()) == pytest.approx(int((each > threshold).sum()), abs=1)


def test_lamp_is_the_formula():
    model = mlp(12, 20, 16)
    with torch.no_grad():
        model[0].weight.mul_(10)  # the scale of a layer makes no difference
    scores = []
    for layer in model:
        squares = layer.weight.detach().double().square().flatten()
        scores.append(torch.stack([value / squares[squares >= value].sum() for value in squares]))
    threshold = torch.cat(scores).sort(descending=True).values[round(0.3 * (240 + 320)) - 1]
    report = prune(model, "bsr1x1@0.7", allocation="lamp", progress=False)
    for each, mask in zip(scores, report.masks.values(), strict=True):
        assert torch.equal(each >= threshold, mask.flatten())


def owl_model() -> nn.Sequential:
    """Four linear layers that pass their input on; the third reads two huge features."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.linalg.qr(torch.randn(64, 64)).Q)
        model[1].weight[:2] *= 60
    return model


def test_owl_keeps_more_where_there_are_outliers():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    model = owl_model()
    with torch.no_grad():
        ratios, y = [], x
        for layer in model:
            metric = layer.weight.abs() * y.square().mean(0).sqrt()
            ratios.append(float((metric > 5 * metric.mean()).double().mean()))
            y = layer(y)
    assert ratios[2] == max(ratios)
    report = prune(model, "bsr1x1@0.7", calibration=[x], allocation="owl", progress=False)
    kept = [float(mask.double().mean()) for mask in report.masks.values()]
    # The paper's formula: [0, 2λ] by the ratio, and the mean at the target.
    low, high = min(ratios), max(ratios)
    above = [0.16 * (ratio - low) / (high - low) for ratio in ratios]
    for density, each in zip(kept, above, strict=True):
        assert density == pytest.approx(0.3 + each - sum(above) / 4, abs=2 / 64**2)
    flat = prune(
        owl_model(), "bsr1x1@0.7", calibration=[x], allocation=OWL(spread=0.0), progress=False
    )
    assert {int(mask.sum()) for mask in flat.masks.values()} == {1229}


def test_owl_gives_one_density_to_a_block():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    with torch.no_grad():
        model[1].down.bias[0] = 500.0
    x = [torch.randn(64, 32)]
    report = prune(model, "bsr1x1@0.5", calibration=x, allocation="owl", progress=False)
    kept = {name: int(mask.sum()) for name, mask in report.masks.items()}
    for block in "012":
        assert abs(kept[f"{block}.up"] - kept[f"{block}.down"]) <= 1
    assert kept["2.up"] > kept["0.up"] + 50


def test_sensitivity_spares_the_layer_that_costs_most():
    rows = [
        SensitivityRow(name, f"bsr1x1@{sparsity}", sparsity, loss)
        for name, losses in {"0": (0.4, 0.9, 2.0), "1": (0.01, 0.02, 0.1)}.items()
        for sparsity, loss in zip((0.25, 0.5, 0.75), losses, strict=True)
    ]
    report = SensitivityReport("magnitude", "evaluate", tuple(rows))
    stored = SensitivityReport.from_dict(json.loads(json.dumps(report.to_dict())))
    model = mlp(16, 16, 16)
    done = prune(model, "bsr1x1@0.5", allocation=Sensitivity(stored), progress=False)
    kept = [int(mask.sum()) for mask in done.masks.values()]
    # All but the quarter of the budget that the second layer cannot do without.
    assert kept == [192, 64]


def test_a_scan_of_its_own_spends_the_budget_better_than_uniform():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loud(x) + 0.05 * self.quiet(x)

    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    errors = {}
    for allocation in ("uniform", "sensitivity"):
        model = Branches()
        prune(model, "bsr1x1@0.6", calibration=[x], allocation=allocation, progress=False)
        with torch.no_grad():
            errors[allocation] = float((model(x) - Branches()(x)).square().mean())
    assert errors["sensitivity"] < 0.3 * errors["uniform"]


def test_a_function_of_ones_own():
    report = prune(mlp(16, 16, 16), "4:8", allocation=lambda budget: [0.25, 0.75], progress=False)
    assert [layer.pattern for layer in report.layers] == ["2:8", "6:8"]


# --- what is refused --------------------------------------------------------------------------


SCANNED = SensitivityReport(
    "magnitude", "evaluate", tuple(SensitivityRow(n, "bsr1x1@0.5", 0.5, 1.0) for n in "01")
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "best"}, "unknown allocation 'best'; known are erk, global"),
        ({"allocation": "owl"}, "allocation 'owl' needs calibration data"),
        ({"allocation": "sensitivity"}, "allocation 'sensitivity' needs calibration data"),
        ({"allocation": "erk", "pattern": "1:4"}, "1:4 leaves an allocation nothing to spread"),
        (
            {"allocation": "erk", "pattern": "bsr16x16@1.0"},
            "keeps 0 blocks, and an allocation at least one in each of 2 layers",
        ),
        ({"allocation": lambda budget: [0.5]}, "expected 2 densities from 0 to 1"),
        ({"allocation": lambda budget: [0.5, 1.5]}, "expected 2 densities from 0 to 1"),
        ({"allocation": Sensitivity(SCANNED)}, "no pattern of the kind of 2:4 for layer '0'"),
        (
            {"allocation": Sensitivity(SCANNED), "pattern": "bsr1x1@0.75"},
            "has to keep 25.0%, but the sparsest patterns of its report keep 50.0%",
        ),
    ],
)
def test_refusals_leave_the_model_as_it_is(arguments, message):
    model = mlp(16, 16, 16)
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(ValueError, match=message):
        prune(model, **{"pattern": "2:4", "progress": False, **arguments})
    assert all(torch.equal(x.weight, y) for x, y in zip(model, before, strict=True))


@pytest.mark.parametrize("options", [{"outliers": 0.0}, {"spread": -0.1}, {"spread": 0.6}])
def test_owl_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match="OWL: "):
        OWL(**options)


def test_a_layer_that_no_batch_runs_takes_no_part():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.also, self.idle = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.also(self.used(x))

    for allocation in ("owl", "global", "sensitivity"):
        torch.manual_seed(0)
        report = prune(
            Half(),
            "bsr4x4@0.5",
            "wanda",
            calibration=[torch.randn(32, 16)],
            allocation=allocation,
            progress=False,
        )
        assert sorted(report.masks) == ["also", "used"]
        assert report.layers[-1].reason == "no calibration batch runs it"


def test_nm_and_vectors_of_one_report_are_kept_apart():
    model = mlp(16, 16, 16)
    x = [torch.randn(32, 16)]
    report = sensitivity(model, ["1:4", "2:4", "3:4", "1:4v4"], x, progress=False)
    done = prune(model, "2:4", allocation=Sensitivity(report), progress=False)
    assert all(NM(2, 4).vector == parse_pattern(row.pattern).vector for row in done.layers)


@pytest.mark.parametrize("allocation", ["global", "sensitivity"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_spread(method, allocation):
    pattern = BlockSparse((4, 4), 0.6)
    options = {
        "calibration": images(10),
        "loss": lambda model, x: model(x).square().mean(),
        "progress": False,
        "reconstruction": "none",
    }
    report = prune(small(), pattern, method, allocation=allocation, **options)
    uniform = prune(small(), pattern, method, **options)
    kept = kept_blocks(pattern, report.masks)
    for layer in report.layers:
        if layer.pattern is None and layer.reason.startswith("its allocation"):
            kept += kept_blocks(pattern, {layer.name: torch.ones(layer.shape, dtype=torch.bool)})
    assert kept == kept_blocks(pattern, uniform.masks)
