"""The code of docs/onnx.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from export_cases import conv, evaluate, linear, randn
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(
        conv((16, 8, 3, 3), activation="relu"), nn.Flatten(2), linear(8, 9)
    ).eval()
    x = randn(4, 8, 5, 5)
    names = {"model": model, "x": x, "batches": [x, 2 * x]}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(torch.from_numpy(names["y"]), expected)
    for name, tolerance in (("dense.onnx", 1e-6), ("int8.onnx", 0.05)):
        session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert (torch.from_numpy(y) - expected).norm() < tolerance * expected.norm()
    (quick,) = evaluate(tmp_path / "quick.onnx", x)
    assert torch.equal(quick, expected)
