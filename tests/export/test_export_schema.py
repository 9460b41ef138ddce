"""ONNX's own checker and shape inference on our nodes, and the lint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_cases import conv, linear, randn, sparse_nodes, write
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.export import lint as lint_module
from sparsekit.export.lint import lint
from sparsekit.export.weights import encode


class Net(nn.Module):
    """Both nodes, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv((16, 8, 3, 3), stride=(1, 2), padding=1)
        self.linear = linear(24, 16)
        self.again = linear(24, 24, "bsr8x8@0.5")

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.conv(x).permute(0, 2, 3, 1))
        return self.again(y, y)


@pytest.fixture
def file(tmp_path: Path) -> onnx.ModelProto:
    path = tmp_path / "net.onnx"
    write(Net(), randn(2, 8, 6, 6), path, dynamic_shapes=({0: "batch", 2: "height"},))
    return onnx.load(path)


def shapes(file: onnx.ModelProto) -> dict[str, list[Any]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*file.graph.value_info, *file.graph.output]
    }


def inferred(file: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(file, check_type=True, strict_mode=True)


def test_shapes_are_inferred_again(file: onnx.ModelProto) -> None:
    before = shapes(file)
    assert len(file.graph.value_info) >= 3
    del file.graph.value_info[:]
    after = shapes(inferred(file))
    ours = [node.output[0] for node in sparse_nodes(file)]
    assert len(ours) == 3
    for name in ours:
        assert after[name] == before[name]
    assert after[ours[0]] == ["batch", 16, "height", 3]
    assert after[ours[2]] == ["batch", "height", 3, 24]


def test_a_size_without_a_name_stays_one(file: onnx.ModelProto) -> None:
    # Of a dimension with a name that the convolution changes, nothing is known.
    first = sparse_nodes(file)[0]
    node = next(each for each in file.graph.node if each.output[0] == first.output[0])
    for attribute in node.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [0, 1, 0, 1]
    del file.graph.value_info[:]
    file.graph.output[0].type.tensor_type.ClearField("shape")
    found = shapes(inferred(file))[first.output[0]]
    assert found[:2] + found[3:] == ["batch", 16, 3]
    assert found[2] not in ("height", 6)  # a name that ONNX made up


def changed(file: onnx.ModelProto, index: int, **values: Any) -> onnx.ModelProto:
    """The file with attributes of one of our nodes replaced; ... removes one."""
    node = [each for each in file.graph.node if each.domain == "sparsekit"][index]
    for name, value in values.items():
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not ...:
            node.attribute.append(helper.make_attribute(name, value))
    return file


REFUSED = [
    (1, {"n": 25}, "weight has shape [228], the attributes say [241]"),
    (1, {"n": ...}, "SparseLinear: the node has no attribute 'n'"),
    (1, {"activation": 9}, "SparseLinear: the node has activation=9"),
    (1, {"dtype": 2, "has_bias": 0}, "SparseLinear: x is FLOAT, dtype says FLOAT16"),
    (0, {"group": 5}, "SparseConv2d: the node has sizes that do not fit"),
    (0, {"strides": [0, 1]}, "SparseConv2d: the node has strides=[0, 1]"),
    (0, {"dilations": [1, 9]}, "SparseConv2d: x has shape ['batch', 8, 'height', 6], which the"),
]


@pytest.mark.parametrize(("index", "values", "message"), REFUSED)
def test_inference_refuses_wrong_attributes(
    file: onnx.ModelProto, index: int, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        inferred(changed(file, index, **values))


def single(x: list[Any], residual: list[Any] | None = None, element: int = 1) -> onnx.ModelProto:
    node, words = encode(sk.pack(randn(16, 8), "2:4").canonical(), None, None, False, None)
    inputs = [helper.make_tensor_value_info("x", element, x)]
    names = ["x", "w"]
    if residual is not None:
        inputs.append(helper.make_tensor_value_info("r", 1, residual))
        names.append("r")
    graph = helper.make_graph(
        [helper.make_node("SparseLinear", names, ["y"], domain="sparsekit", **node.attributes())],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(words.numpy(), "w")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparsekit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_inference_refuses_wrong_shapes() -> None:
    sk.export.register_schemas()
    sk.export.register_schemas()  # a second time changes nothing
    assert shapes(inferred(single(["a", 5, 8])))["y"] == ["a", 5, 16]
    assert shapes(inferred(single(["a", "k"], ["a", 16])))["y"] == ["a", 16]
    for x in (["a", 9], []):
        with pytest.raises(ValueError, match=r"x has shape \[.*\], expected \[\.\.\., 8\]"):
            inferred(single(x))
    with pytest.raises(ValueError, match=r"residual has shape .*8\], the result has .*16\]"):
        inferred(single(["a", 8], ["a", 8]))
    with pytest.raises(ValueError, match="SparseLinear: x is FLOAT16, dtype says FLOAT"):
        inferred(single(["a", 8], element=TensorProto.FLOAT16))


def test_an_image_of_another_shape(file: onnx.ModelProto) -> None:
    dims = file.graph.input[0].type.tensor_type.shape.dim
    dims[1].dim_value = 9
    with pytest.raises(ValueError, match=r"x has shape \['batch', 9, .*expected \[N, 8, H, W\]"):
        inferred(file)


def test_the_checker_knows_the_attributes(file: onnx.ModelProto) -> None:
    onnx.checker.check_model(file, full_check=True)
    with pytest.raises(onnx.checker.ValidationError, match="extra"):
        onnx.checker.check_model(changed(file, 1, extra=1))
    with pytest.raises(onnx.checker.ValidationError, match="nnzb"):
        onnx.checker.check_model(changed(file, 1, extra=..., nnzb=...))


# --- lint -------------------------------------------------------------------------------------


def problems(file: onnx.ModelProto) -> str:
    return "; ".join(lint(ir.serde.deserialize_model(file)))


def with_weight(file: onnx.ModelProto, values: Any) -> onnx.ModelProto:
    name = sparse_nodes(file)[1].input[1]
    for initializer in file.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(numpy_helper.from_array(values, name))
    return file


def test_lint_finds_nothing_in_what_is_written(file: onnx.ModelProto) -> None:
    assert lint(ir.serde.deserialize_model(file)) == []


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "uint32"])
def test_lint_of_a_constant_that_readers_refuse(file: onnx.ModelProto, dtype: str) -> None:
    found = problems(with_weight(file, np.zeros(528, dtype)))
    assert f"the constant linear.weight is {dtype.upper()}, expected INT32" in found


def test_lint_of_a_weight_of_another_length(file: onnx.ModelProto) -> None:
    found = problems(with_weight(file, np.zeros(7, np.int32)))
    assert re.search(r"the weight has shape \[7\], expected \[\d+\]", found)


def test_lint_of_attributes(file: onnx.ModelProto) -> None:
    assert "n is 4294967296, beyond an int32" in problems(changed(file, 1, n=2**32))
    changed(file, 1, n=24)
    found = problems(changed(file, 1, plugin_namespace="SparseKit"))
    assert "plugin_namespace is 'SparseKit', the domain 'sparsekit'" in found
    changed(file, 1, plugin_namespace="sparsekit")
    assert "has dtype=7, expected one of" in problems(changed(file, 1, dtype=7))


def test_lint_of_names(file: onnx.ModelProto) -> None:
    node = next(each for each in file.graph.node if each.domain == "sparsekit")
    node.op_type = "Conv"
    assert "has the name of an ONNX operator" in problems(file)
    node.op_type, node.domain = "SparseConv2d", "sparsekit.packed"
    assert "was not lowered" in problems(file)


def test_lint_of_a_weight_that_is_no_constant(file: onnx.ModelProto) -> None:
    node = next(each for each in file.graph.node if each.domain == "sparsekit")
    file.graph.input.append(helper.make_tensor_value_info("fed", TensorProto.INT32, [4]))
    node.input[1] = "fed"
    assert "the weight is no constant" in problems(file)


def test_the_exporter_writes_nothing_that_the_lint_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lint_module, "lint", lambda model: ["a problem", "another"])
    with pytest.raises(RuntimeError, match="the graph would not be read: a problem; another"):
        write(linear(8, 8), torch.randn(1, 8), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
