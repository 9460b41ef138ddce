"""The gate's verdict on convolutions: each shape, what saves little, what NCHW costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conv_models import IMAGE, ResNet, exact, formats, network, prune, run
from torch import nn

import sparsekit as sk
from sparsekit import gate
from sparsekit.convert import ConvertReport
from sparsekit.convert.judge import MIN_CONV_SAVING_MS
from sparsekit.gate import Verdict
from sparsekit.workload import ConvWorkload, LinearWorkload

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def reasons(report: ConvertReport) -> dict[str, str]:
    return {row.layer: row.reason for row in report.rows if row.verdict == "dense"}


def judged(
    monkeypatch: pytest.MonkeyPatch, ms: Callable[[ConvWorkload], float]
) -> list[ConvWorkload]:
    """Replaces the measurement: dense takes a millisecond, sparse what is given."""
    seen: list[ConvWorkload] = []

    def fake(workload: ConvWorkload | LinearWorkload) -> Verdict:
        if isinstance(workload, LinearWorkload):
            return Verdict(1.0, 1.0, 1.0, "torch", "kernel")
        seen.append(workload)
        sparse = ms(workload)
        return Verdict(1.0, sparse, 1 / sparse, "torch", "kernel")

    monkeypatch.setattr(gate, "measure", fake)
    return seen


def test_each_shape_is_judged_with_its_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = judged(monkeypatch, lambda _: 0.5)
    conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, dilation=2, groups=2)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), conv, nn.ReLU())
    report = sk.convert(model, "2:4", [X, X[:1], X[0]], progress=False)
    assert report.sparse == ["0", "1"]
    mine = [each for each in seen if each.stride == (2, 2)]
    assert {each.size for each in mine} == {(2, 16, 6, 6), (1, 16, 6, 6)}
    for each in mine:
        assert (each.padding, each.dilation, each.activation) == ((1, 1), (2, 2), "relu")
        assert each.packed.meta.groups == 2
        assert each.bias is not None
        assert each.channels_last
    row = report.rows[1]
    assert row.m == (8, 4, 4)
    assert row.inputs == ("2x16x6x6 NHWC", "1x16x6x6 NHWC", "16x6x6 HWC")
    assert (row.dense_ms, row.sparse_ms, row.speedup) == (3.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("extra_ms", "verdict", "says"),
    [
        (0.25, "sparse", "1.33x of dense (torch)"),
        (0.75, "dense", "0.80x of dense (torch), less than 1.05x"),
    ],
)
def test_what_converting_costs_is_said_and_counts(
    monkeypatch: pytest.MonkeyPatch, extra_ms: float, verdict: str, says: str
) -> None:
    judged(monkeypatch, lambda each: 0.5 if each.channels_last else 0.5 + extra_ms)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    first, second = sk.convert(prune(model), "2:4", X, progress=False).rows
    assert first.verdict == verdict
    assert first.nchw_ms is not None
    assert first.nchw_ms > 0
    cost = f"converting it takes {first.nchw_ms:.3f} ms of that"
    assert first.reason == f"{says}; x comes as NCHW: {cost}"
    assert (second.verdict, second.nchw_ms) == ("sparse", None)


def test_a_stem_that_loses_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda each: 2.0 if each.size[1] == 3 else 0.5)
    model, x = network("resnet")
    expected = exact(model, x)
    report = sk.convert(model, "2:4", x, fold_batchnorm=True, progress=False)
    assert set(reasons(report)) == {"stem", "head"}
    assert "0.50x of dense (torch), less than 1.05x" in reasons(report)["stem"]
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert [name for name, beside in formats(model, x).items() if not beside] == ["stem"]
    torch.testing.assert_close(run(model, x), expected)


def test_slower_at_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda each: 1.5 if each.size[0] == 1 else 0.1)
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    reason = sk.convert(model, "2:4", [X, X, X, X[:1]], progress=False).rows[0].reason
    assert reason.startswith("slower than dense at 1x16x6x6 NCHW (0.67x)")


def test_other_paddings_are_measured_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = judged(monkeypatch, lambda _: 0.5)
    conv = nn.Conv2d(16, 16, 3, padding=2, padding_mode="reflect")
    sk.convert(nn.Sequential(conv), "2:4", X, progress=False)
    assert {(each.size, each.padding) for each in seen} == {((2, 16, 10, 10), 0)}


def test_empty_inputs_alone_give_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda _: 0.5)
    report = sk.convert(nn.Sequential(nn.Conv2d(16, 16, 3)), "2:4", X[:0], progress=False)
    assert reasons(report) == {"0": "it ran on empty inputs only"}


def test_measured_for_real() -> None:
    model = prune(ResNet()).eval()
    report = sk.convert(model, "2:4", IMAGE, fold_batchnorm=True, progress=False, targets="*.conv1")
    for row in report.rows:
        assert row.speedup is not None
        assert row.dense_ms is not None
        assert row.sparse_ms is not None
        wins = row.speedup >= gate.MIN_SPEEDUP
        assert (row.verdict == "sparse") == (
            wins and row.dense_ms - row.sparse_ms >= MIN_CONV_SAVING_MS
        )


@pytest.mark.parametrize(("saved", "verdict"), [(0.04, "dense"), (0.06, "sparse")])
def test_what_saves_little_stays_dense(
    saved: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Verdict(0.1, 0.1 - saved, 0.1 / (0.1 - saved), "torch", "kernel")
    monkeypatch.setattr(gate, "measure", lambda _: measured)
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    row = sk.convert(model, "2:4", [X, X], progress=False).rows[0]
    assert row.verdict == verdict
    assert ("which saves 0.040 ms a call, less than 0.05" in row.reason) == (verdict == "dense")
