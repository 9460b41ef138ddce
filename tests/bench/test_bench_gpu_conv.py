from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_conv
from bench.conv_case import ConvCase, ConvLayer
from bench.gpu_conv import DENSE, OURS, Result, arguments, cases, main, mean_speedups, save

CPU = torch.device("cpu")
CASE = ConvCase(ConvLayer("small", 16, 24, 3, 5), 2, "2:4", torch.float16)


class FakeTurns:
    """A path that always takes as long as its name says."""

    captured, reason = True, ""

    def __init__(self, path: Any, check: Callable[[Tensor], None]) -> None:
        check(path.make()())
        self._seconds = 1e-6 * (1 + path.weight_bytes)

    def turn(self) -> list[float]:
        return [self._seconds]

    __call__ = turn


def result(layer: str = "3x3-256-256-at-14", speedup: float = 1.5) -> Result:
    return Result(layer, 64, "2:4", "kernel", {OURS: 10.0, DENSE: 15.0, "other": 12.0}, speedup, {})


def test_cases_are_chosen_by_name() -> None:
    assert len(cases(["*"], ["*"])) == len(gpu_conv.LAYERS) * 2 * len(gpu_conv.PATTERNS)
    chosen = cases(["3x3-512*"], ["2:4"])
    assert {case.layer.inputs for case in chosen} == {512}
    assert {case.batch for case in chosen} == {1, 64}
    with pytest.raises(SystemExit):
        arguments(["--layers", "5x5*"])


def test_a_case_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose kernels stand in for those of a GPU."""
    measured = gpu_conv.measure(CASE, CPU, FakeTurns, 0.0)  # type: ignore[arg-type]
    assert measured.us[OURS] > 0
    assert measured.kernel.startswith("conv2d_nm")
    assert measured.kernel in measured.us
    assert measured.speedup == pytest.approx(measured.us[DENSE] / measured.us[OURS])
    assert not measured.unavailable
    zeros = torch.zeros(2, 24, 5, 5)
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *_: zeros)
    with pytest.raises(AssertionError):
        gpu_conv.measure(CASE, CPU, FakeTurns, 0.0)  # type: ignore[arg-type]


def test_a_kernel_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    known = gpu_conv.Paths.kernels
    monkeypatch.setattr(gpu_conv.Paths, "kernels", lambda self: [*known(self), "conv2d_none"])
    with pytest.raises(ValueError, match="no kernel is called 'conv2d_none'"):
        gpu_conv.measure(CASE, CPU, FakeTurns, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(
        gpu_conv.Paths, "kernels", lambda self: [*known(self), "conv2d_bsr_f16_scalar"]
    )
    measured = gpu_conv.measure(CASE, CPU, FakeTurns, 0.0)  # type: ignore[arg-type]
    assert "reads format bsr" in measured.unavailable["conv2d_bsr_f16_scalar"]


def test_the_report(tmp_path: Path) -> None:
    results = [result(), result("3x3-64-64-at-56", 0.8), replace(result(speedup=2.16), batch=1)]
    markdown, figures = save(results, "Some GPU", "sm90", tmp_path)
    assert markdown.name.endswith("-some-gpu-sm90-conv.md")
    text = markdown.read_text()
    assert "3x3-64-64-at-56, batch 64" in text
    assert "- 2:4: 1.80x" in text  # the square root of 1.5 times 2.16; 64 channels do not count
    assert "other 12.0" in text
    assert mean_speedups(results)["2:4"] == pytest.approx(1.8)
    assert json.loads(figures.read_text())[1]["speedup"] == 0.8


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--list", "--layers", "3x3-64*", "--patterns", "2:4"])
    assert "3x3-64-64-at-56-batch1-2:4-f16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        main([])
