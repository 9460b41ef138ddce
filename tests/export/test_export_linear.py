"""Linear layers in ONNX files: what is written, and that it computes what the model does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_cases import (
    ACTIVATIONS,
    DTYPES,
    PATTERNS,
    Each,
    assert_same_bits,
    attributes,
    constants,
    evaluate,
    linear,
    packed,
    randn,
    results,
    sparse_nodes,
    write,
)
from onnx import TensorProto, helper
from onnxscript import ir
from torch import Tensor, nn

import sparsekit as sk
from sparsekit import _native
from sparsekit.export.calls import find_calls
from sparsekit.export.lower import lower
from sparsekit.export.nodes import SparseNode
from sparsekit.export.trace import PACKED
from sparsekit.export.weights import encode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern(dtype: torch.dtype, path: Path) -> None:
    model = Each(
        [linear(52, 68, pattern, dtype, bias=i % 2 == 0) for i, pattern in enumerate(PATTERNS)]
    )
    x = randn(3, 5, 68, dtype=dtype)
    report = write(model, (x,), path, dynamic_shapes=({0: "batch", 1: "seq"},))
    assert [row.node for row in report.rows] == ["SparseLinear"] * len(PATTERNS)
    for shape in ((3, 5), (1, 7), (2, 0)):
        x = randn(*shape, 68, dtype=dtype)
        assert_same_bits(evaluate(path, x), results(model, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(dtype: torch.dtype, path: Path) -> None:
    layers = [linear(24, 32, "2:4", dtype, activation) for activation in ACTIVATIONS]
    model, x = Each(layers), 3 * randn(9, 32, dtype=dtype)
    write(model, x, path)
    assert_same_bits(evaluate(path, x), results(model, x))
    assert [attributes(node)["activation"] for node in sparse_nodes(path)] == list(range(6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_for_gpus(dtype: torch.dtype, path: Path) -> None:
    patterns = ("2:4", "2:4v4", "bsr16x16@0.5", "bsr32x64@0.75")
    model, x = (
        Each([linear(80, 96, pattern, dtype) for pattern in patterns]),
        randn(3, 96, dtype=dtype),
    )
    report = write(model, x, path, weights="cuda")
    expected = ("nm", "bsr") if dtype == torch.float32 else ("nm_mma_sp", "bsr_mma")
    assert [row.format for row in report.rows] == [expected[0]] * 2 + [expected[1]] * 2
    assert_same_bits(evaluate(path, x), results(model, x))


def test_a_layer_without_a_format_for_gpus_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _native.default_format

    def default_format(pattern: Any, dtype: torch.dtype, target: str, op: str) -> str:
        if target == "cuda" and pattern == sk.NM(1, 4):  # as all of them in a build without CUDA
            raise NotImplementedError("nothing takes 1:4")
        return given(pattern, dtype, target, op)

    monkeypatch.setattr(_native, "default_format", default_format)
    model = Each([linear(16, 16, "2:4", torch.float16), linear(16, 16, "1:4", torch.float16)])
    refusal = r"'layers\.1' .* write weights='canonical'.* nothing takes 1:4"
    with pytest.raises(NotImplementedError, match=refusal):
        write(model, randn(2, 16, dtype=torch.float16), path, weights="cuda")
    assert not path.exists()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(32, 32, activation="relu")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.layer(x, residual)


def test_a_residual_is_the_third_input(path: Path) -> None:
    model, inputs = Residual(), (randn(2, 3, 32), randn(2, 3, 32, seed=5))
    report = write(model, inputs, path)
    assert report.rows[0].residual
    (node,) = sparse_nodes(path)
    assert list(node.input) == ["x", "layer.weight", "residual"]
    assert_same_bits(evaluate(path, *inputs), results(model, *inputs))


def one_node(node: SparseNode, weight: Tensor, x_shape: Any, residual: bool) -> onnx.ModelProto:
    """A graph of a single node, as another program might write it."""
    element = {torch.float32: 1, torch.bfloat16: 16, torch.float16: 10}[node.dtype]
    names = ["x", "weight"] + ["residual"] * residual
    info = [helper.make_tensor_value_info("x", element, x_shape)]
    if residual:
        info.append(helper.make_tensor_value_info("residual", element, None))
    graph = helper.make_graph(
        [helper.make_node(node.op_type, names, ["y"], domain="sparsekit", **node.attributes())],
        "graph",
        info,
        [helper.make_tensor_value_info("y", element, None)],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparsekit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("first", [False, True])
def test_residual_before_and_after_the_activation(first: bool) -> None:
    weight, bias = packed(24, 32), randn(24, seed=1)
    node, words = encode(weight.canonical(), bias, "relu", first, None)
    x, added = randn(2, 3, 32), randn(2, 3, 24, seed=2)
    dense = nn.functional.linear(x.double(), weight.to_dense().double(), bias.double())
    expected = (dense + added).relu() if first else dense.relu() + added
    (y,) = evaluate(one_node(node, words, ["a", "b", 32], True), x, added)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    if not first:
        assert torch.equal(y, sk.linear(x, weight, bias, "relu", added))


def test_any_leading_dimensions(path: Path) -> None:
    layer = linear(16, 24)
    for shape in ((24,), (1, 24), (2, 3, 4, 24)):
        x = randn(*shape)
        write(layer, x, path)
        assert_same_bits(evaluate(path, x), results(layer, x))


class Uses(nn.Module):
    """Functions, a shared layer, one that the graph does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = packed(32, 32)
        self.shift = nn.Parameter(randn(32, seed=4))
        self.shared = linear(32, 32)
        self.same = self.shared
        self.idle = linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = sk.linear(x, self.weight, self.shift, "silu", residual=x)
        x = self.same(self.shared(x))
        return sk.linear(x, self.weight, self.shift) + sk.linear(x, self.weight)


def test_functions_and_shared_layers(path: Path) -> None:
    model, x = Uses(), randn(4, 32)
    report = write(model, x, path)
    assert report.absent == ["idle"]
    assert "not called by the graph: idle" in str(report)
    nodes = sparse_nodes(path)
    weights = [node.input[1] for node in nodes]
    # By the pair of weight and bias: the function's with the bias twice, the module twice.
    assert len(nodes) == 5
    assert len(set(weights)) == 3
    assert weights[0] == weights[3]
    assert weights[1] == weights[2]
    assert "same.weight" in weights or "shared.weight" in weights
    assert_same_bits(evaluate(path, x), results(model, x))


@pytest.mark.parametrize("size", [8, 64])
def test_equal_layers_keep_their_names(size: int, path: Path) -> None:
    # The exporter merges equal constants.
    first = linear(size, size)
    model = nn.Sequential(first, copy.deepcopy(first), nn.Sequential(copy.deepcopy(first)))
    x = randn(3, size)
    report = write(model, x, path)
    assert [row.layer for row in report.rows] == ["0", "1", "2.0"]
    assert report.absent == []
    assert_same_bits(evaluate(path, x), results(model, x))
    write(model, x, path, dense=True, quantize="int8")
    scales = [constants(path)[f"{name}.input_scale"] for name in ("0", "1", "2.0")]
    assert len(set(map(float, scales))) == 3


def test_a_weight_that_comes_in_as_an_input_is_refused(path: Path) -> None:
    weight = packed(16, 16)

    class Fed(nn.Module):
        def forward(self, x: Tensor, data: Tensor) -> Tensor:
            return torch.ops.sparsekit.linear(x, data, 16)

    with pytest.raises(ValueError, match="the packed weight of 'linear' is computed by the graph"):
        write(Fed(), (randn(2, 16), weight.data), path)

    class Shifted(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return sk.linear(x, weight, bias)

    with pytest.raises(ValueError, match="the bias of 'linear' is computed by the graph"):
        write(Shifted(), (randn(2, 16), randn(16)), path)


def test_a_branch(path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = linear(16, 16, "2:4"), linear(16, 16, "bsr16x16@0.5")

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: self.yes(v), lambda v: self.no(v), (x,))

    model = Branch().eval()
    write(model, torch.ones(2, 16), path)
    for x in (torch.ones(2, 16), -torch.ones(2, 16)):
        assert_same_bits(evaluate(path, x), results(model, x))


def test_the_file(path: Path) -> None:
    model, x = nn.Sequential(linear(32, 16, "2:4", torch.float16), nn.ReLU()), randn(2, 16).half()
    report = write(
        model, x, path, dynamic_shapes=({0: "batch"},), input_names=["tokens"], output_names=["out"]
    )
    assert report.nbytes == path.stat().st_size
    file = onnx.load(path)
    assert file.ir_version <= 10
    assert {each.domain: each.version for each in file.opset_import} == {"": 20, "sparsekit": 1}
    (node,) = sparse_nodes(path)
    assert attributes(node) == {
        "n": 32,
        "k": 16,
        "pattern": [0, 2, 4, 1, 0, 0],
        "nnzb": 0,
        "dtype": 2,
        "format": b"canonical",
        "has_bias": 1,
        "activation": 0,
        "residual_first": 0,
        "plugin_version": b"1",
        "plugin_namespace": b"sparsekit",
    }
    assert [value.name for value in file.graph.input] == ["tokens"]
    assert [value.name for value in file.graph.output] == ["out"]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    # Nothing of the packed bytes or the bias is left beside the weight.
    (constant,) = file.graph.initializer
    assert (constant.name, constant.data_type) == ("0.weight", TensorProto.INT32)
    assert constants(path)["0.weight"].nbytes == report.rows[0].nbytes


@pytest.mark.parametrize("opset", [18, 19, 20, 21])
def test_opsets(opset: int, path: Path) -> None:
    model, x = nn.Sequential(linear(32, 16), nn.GELU(), linear(16, 32)), randn(2, 16)
    write(model, x, path, opset_version=opset)
    found = {each.domain: each.version for each in onnx.load(path).opset_import}
    assert found[""] == opset
    torch.testing.assert_close(evaluate(path, x), results(model, x))


def test_the_model_is_not_changed(path: Path) -> None:
    model = nn.Sequential(linear(32, 16), nn.Dropout(0.9), linear(16, 32)).train()
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    data, bias = model[0].packed_data, model[0].bias
    modes = [module.training for module in model.modules()]
    write(model, randn(2, 16), path)
    assert [module.training for module in model.modules()] == modes
    assert model[0].packed_data is data
    assert model[0].bias is bias
    assert bias.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_pre_hooks
    # In eval mode: no dropout in the file.
    model.eval()
    x = randn(3, 16)
    write(model, x, path)
    assert_same_bits(evaluate(path, x), results(model, x))


def test_a_model_that_is_the_layer(path: Path) -> None:
    layer, x = linear(16, 16), randn(2, 16)
    report = write(layer, x, path)
    assert list(constants(path)) == ["weight"]
    assert "(the model)" in str(report)
    assert report.absent == []


def test_a_model_without_sparse_layers(path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), randn(2, 8)
    report = write(model, x, path)
    size = f"{report.nbytes / 1e6:.2f} MB"
    assert str(report) == f"input input: float [2, 8]\n{path}: 0 sparse layers, {size}"
    assert [each.domain for each in onnx.load(path).opset_import] == [""]


def test_autocast(path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(16, 16, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x).float()

    model, x = Cast(), randn(3, 16)
    write(model, x, path)
    assert_same_bits(evaluate(path, x), results(model, x))


def test_a_cast_that_the_exporter_left(path: Path) -> None:
    weight, bias = packed(16, 16, dtype=torch.bfloat16), randn(16, seed=1)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape((2, 16)))
    stored = [
        ir.Value(name=name, const_value=ir.tensor(value))
        for name, value in (("packed", weight.data), ("bias", bias))
    ]
    cast = ir.node("Cast", stored[1:], {"to": ir.DataType.BFLOAT16.value})
    epilogue = {"activation": "relu", "residual_first": 0}
    inputs = [x, stored[0], cast.outputs[0]]
    call = ir.node("SparseLinear", inputs, epilogue, domain=PACKED)
    (y,) = call.outputs
    y.name, y.type, y.shape = "y", x.type, x.shape
    opsets = {"": 20, PACKED: 1}
    graph = ir.Graph([x], [y], nodes=[cast, call], initializers=stored, opset_imports=opsets)
    model = ir.Model(graph, ir_version=10)
    (row,) = lower(model, find_calls(model, ()), "canonical", lambda: None)
    assert row.layer == "y"
    ir.save(model, path)
    assert list(constants(path)) == ["y.weight"]
    assert [node.op_type for node in onnx.load(path).graph.node] == ["SparseLinear"]
    given = randn(2, 16, dtype=torch.bfloat16)
    assert_same_bits(evaluate(path, given), [sk.linear(given, weight, bias.bfloat16(), "relu")])


def test_the_report_is_a_table(path: Path) -> None:
    model = nn.Sequential(linear(32, 16, activation="gelu"))
    lines = str(write(model, randn(2, 16), path)).splitlines()
    assert lines[0].split() == ["layer", "node", "pattern", "dtype", "format", "MB", "epilogue"]
    assert lines[2].split() == ["0", "SparseLinear", "2:4", "float32", "canonical", "0.001", "gelu"]
    assert lines[3] == "input input: float [2, 16]"
    assert lines[4].startswith(f"{path}: 1 sparse layers, 0.0")
