"""TensorRT's own parser reads what we export, and hands our plugins the attributes of a node."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import attributes, conv, linear, randn, sparse_nodes, write
from test_export_models import MAKERS
from torch import nn

from sparsekit.export import nodes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: its wheels are for x86-64",
)

_WORKER = Path(__file__).with_name("tensorrt_parser.py")
_NAMES = {
    nodes.LINEAR: [*nodes.LINEAR_ATTRIBUTES],
    nodes.CONV2D: [*nodes.CONV_ATTRIBUTES],
}


def parse(file: Path) -> dict[str, Any]:
    command = [sys.executable, str(_WORKER), str(file), json.dumps(_NAMES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def as_fields(node: Any) -> dict[str, Any]:
    """The attributes of a node as the parser should hand them over."""
    fields = {}
    for name, value in attributes(node).items():
        if isinstance(value, bytes):
            fields[name] = ["CHAR", [*value, 0]]
        else:
            fields[name] = ["INT32", list(value) if isinstance(value, list) else [value]]
    return fields


CASES: dict[str, tuple[nn.Module, Any]] = {
    "linear": (linear(48, 32, activation="gelu"), randn(2, 32)),
    "vectors": (linear(48, 32, "2:4v4", torch.float16), randn(2, 32, dtype=torch.float16)),
    "blocks": (linear(64, 48, "bsr16x16@0.5", bias=False), randn(2, 48)),
    "conv": (
        conv((32, 16, 3, 3), groups=2, stride=2, padding=1, activation="relu"),
        randn(1, 32, 9, 9),
    ),
    "conv1d": (conv((32, 16, 5), "bsr16x16@0.5", dilation=2), randn(1, 16, 20)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_creator_is_handed_every_attribute(name: str, tmp_path: Path) -> None:
    model, x = CASES[name]
    weights = "cuda" if name == "vectors" else "canonical"
    path = tmp_path / "model.onnx"
    write(model, x, path, weights=weights, dynamic_shapes=({0: "batch"},) if x.dim() == 2 else None)
    (node,) = sparse_nodes(path)
    result = parse(path)
    (seen,) = result["seen"]
    # The parser needs the last two itself to find the creator.
    assert seen == as_fields(node)
    assert not result["read"]
    assert "Could not create the plugin" in result["errors"][0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_whole_network_is_read(name: str, tmp_path: Path) -> None:
    make, _ = MAKERS[name]
    model, sizes, batches = make()
    path = tmp_path / "model.onnx"
    write(model, batches[0], path, dense=True, quantize="int8", dynamic_shapes=sizes)
    result = parse(path)
    assert result["read"], result["errors"]
    # A sparse one as far as the first node of ours, for which the creator makes no plugin.
    write(model, batches[0], path, dynamic_shapes=sizes)
    result = parse(path)
    assert result["seen"][0] == as_fields(sparse_nodes(path)[0])
    assert "Could not create the plugin" in result["errors"][0]
