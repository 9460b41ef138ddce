"""Plain ONNX with the zeros in place, in floating point and int8, and that ONNX Runtime runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conv_models import always, network
from export_cases import (
    ACTIVATIONS,
    PATTERNS,
    Each,
    attributes,
    constants,
    conv,
    evaluate,
    linear,
    packed,
    randn,
    results,
    sparse_nodes,
    write,
)
from torch import Tensor, nn

import sparsekit as sk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feeds)]


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Residual(nn.Module):
    """Linear layers and convolutions with residuals in both orders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv((16, 16, 3, 3), padding=1, activation="relu")
        self.linear = linear(16, 16, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x, residual=self.conv(x, residual=x), residual_first=True)
        x = x.permute(0, 2, 3, 1)
        return self.linear(x, x)


# --- floating point ---------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [18, 20])
def test_every_pattern_and_activation(opset: int, path: Path) -> None:
    layers = [linear(48, 64, pattern, bias=i % 2 == 0) for i, pattern in enumerate(PATTERNS)]
    layers += [linear(24, 64, activation=name) for name in ACTIVATIONS]
    model, x = Each(layers), 2 * randn(3, 5, 64)
    report = write(model, x, path, dense=True, opset_version=opset, dynamic_shapes=({0: "b"},))
    assert {(row.node, row.format) for row in report.rows} == {("MatMul", "dense")}
    assert sparse_nodes(path) == []
    assert [each.domain for each in onnx.load(path).opset_import] == [""]
    assert ("Gelu" in nodes(path), "Erf" in nodes(path)) == (opset >= 20, opset < 20)
    for some in (x, x[:1]):
        assert_close(run(path, some), results(model, some))


def test_convolutions(path: Path) -> None:
    model = Each(
        [
            conv((24, 16, 3, 2), "1:4", stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            conv((24, 8, 3, 3), "2:4", groups=2, activation="relu6"),
            conv((32, 4, 4, 2), "2:4v8", groups=4, padding="same", activation="silu"),
            conv((32, 16, 3, 3), "bsr16x16@0.5", padding=2, activation="gelu_tanh"),
        ]
    )
    x = randn(2, 16, 9, 11)
    write(model, x, path, dense=True, dynamic_shapes=({0: "batch"},))
    for some in (x, x[:1]):
        assert_close(run(path, some), results(model, some))
    weight = constants(path)["layers.1.weight"]
    assert np.array_equal(weight, model.layers[1].packed.to_dense().numpy())
    assert sk.NM(2, 4).fits(
        torch.from_numpy(weight.copy()).permute(0, 2, 3, 1).reshape(24, -1) != 0
    )


def test_conv1d(path: Path) -> None:
    model, x = conv((16, 4, 3), "2:4", groups=2, dilation=2, padding="same"), randn(2, 8, 20)
    write(model, x, path, dense=True)
    assert_close(run(path, x), results(model, x))


def test_residuals(path: Path) -> None:
    model, x = Residual(), randn(2, 16, 5, 5)
    write(model, x, path, dense=True, dynamic_shapes=({0: "batch"},))
    assert_close(run(path, x), results(model, x))


def test_the_weight_of_a_matmul_is_transposed_and_keeps_its_zeros(path: Path) -> None:
    layer, x = linear(24, 32), randn(3, 32)
    write(layer, x, path, dense=True)
    weight = constants(path)["weight"]
    assert weight.shape == (32, 24)
    assert np.array_equal(weight.T, layer.packed.to_dense().numpy())
    assert sk.NM(2, 4).fits(torch.from_numpy(weight.T.copy()) != 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_2_byte_types(dtype: torch.dtype, path: Path) -> None:
    layers = [
        linear(24, 32, activation=name, dtype=dtype) for name in ("gelu", "gelu_tanh", "relu6")
    ]
    model, x = Each(layers), randn(3, 32, dtype=dtype)
    for opset in (18, 20):
        write(model, x, path, dense=True, opset_version=opset)
        got = evaluate(path, x)
        assert {y.dtype for y in got} == {dtype}
        for y, expected in zip(got, results(model, x), strict=True):
            scale = expected.float().abs().max()
            error = (y.float() - expected.float()).abs().max() / scale
            assert error < 8 * torch.finfo(dtype).eps


def test_shared_layers_share_their_weight(path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model, x = Twice(), randn(2, 16)
    for quantize in (None, "int8"):
        write(model, x, path, dense=True, quantize=quantize)
        weights = [name for name in constants(path) if name.startswith("layer.weight")]
        assert weights == ["layer.weight"] + ["layer.weight_scale"] * (quantize == "int8")


# --- int8 -------------------------------------------------------------------------------------


def initializers(path: Path, op_type: str, index: int) -> list[Any]:
    """The constants that nodes of a type have as one of their inputs; None where it is none."""
    found = constants(path)
    file = onnx.load(path)
    return [found.get(node.input[index]) for node in file.graph.node if node.op_type == op_type]


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.5"])
def test_int8_keeps_zeros_and_the_pattern(pattern: str, path: Path) -> None:
    model = nn.Sequential(linear(48, 64, pattern, activation="relu"), linear(32, 48, pattern))
    x = randn(6, 64)
    report = write(model, x, path, dense=True, quantize="int8")
    assert {row.dtype for row in report.rows} == {"int8"}
    for layer, stored in zip(model, ("0.weight", "1.weight"), strict=True):
        weight = constants(path)[stored]
        dense = layer.packed.to_dense()
        assert weight.dtype == np.int8
        assert weight.min() >= -127
        assert not weight.T[dense.numpy() == 0].any()
        scale = torch.from_numpy(constants(path)[f"{stored}_scale"].copy())
        torch.testing.assert_close(scale, dense.abs().amax(1).clamp(min=0) / 127)
        back = torch.from_numpy(weight.T.astype(np.float32)) * scale[:, None]
        assert bool(((back - dense).abs() <= 0.5001 * scale[:, None]).all())
        assert layer.meta.pattern.fits(torch.from_numpy(weight.T != 0))


def test_int8_of_a_convolution_keeps_the_pattern(path: Path) -> None:
    model, x = conv((24, 8, 3, 3), "2:4", groups=2), randn(2, 16, 6, 6)
    write(model, x, path, dense=True, quantize="int8")
    weight = constants(path)["weight"]
    assert (weight.dtype, weight.shape) == (np.int8, (24, 8, 3, 3))
    assert not weight[model.packed.to_dense().numpy() == 0].any()
    assert constants(path)["weight_scale"].shape == (24,)
    (dequantize,) = [
        node
        for node in onnx.load(path).graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] == "weight"
    ]
    assert attributes(dequantize)["axis"] == 0


def test_int8_nodes_are_where_tensorrt_looks_for_them(path: Path) -> None:
    model, x = nn.Sequential(linear(32, 16, activation="relu"), nn.Linear(32, 8)), randn(4, 16)
    write(model, x, path, dense=True, quantize="int8")
    file = onnx.load(path)
    by_output = {node.output[0]: node for node in file.graph.node}
    (product,) = [
        node
        for node in file.graph.node
        if node.op_type == "MatMul" and "0.weight" in by_output[node.input[1]].input
    ]
    left, right = (by_output[name] for name in product.input)
    assert (left.op_type, right.op_type) == ("DequantizeLinear", "DequantizeLinear")
    assert by_output[left.input[0]].op_type == "QuantizeLinear"
    assert list(by_output[left.input[0]].input[1:]) == list(left.input[1:])
    assert attributes(right)["axis"] == 1
    for zeros in initializers(path, "DequantizeLinear", 2):
        assert zeros.dtype == np.int8
        assert not zeros.any()
    # The dense layer and every bias stay as they were.
    assert nodes(path).count("QuantizeLinear") == 1
    assert constants(path)["0.bias"].dtype == np.float32


def test_int8_is_close(path: Path) -> None:
    model, x = Residual(), randn(4, 16, 5, 5)
    write(model, x, path, dense=True, quantize="int8", dynamic_shapes=({0: "batch"},))
    (got,), (expected,) = run(path, x), results(model, x)
    error = (got - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.03


def test_the_scale_is_the_largest_magnitude_of_all_batches(path: Path) -> None:
    model = nn.Sequential(linear(16, 16))
    batches = [torch.ones(2, 16), -5 * torch.ones(3, 16), (torch.ones(1, 16),)]
    write(model, torch.ones(2, 16), path, dense=True, quantize="int8", calibration=iter(batches))
    assert constants(path)["0.input_scale"] == np.float32(5 / 127)
    write(
        model,
        torch.ones(2, 16),
        path,
        dense=True,
        quantize="int8",
        calibration=3 * torch.ones(2, 16),
    )
    assert constants(path)["0.input_scale"] == np.float32(3 / 127)
    write(model, torch.ones(2, 16), path, dense=True, quantize="int8")
    assert constants(path)["0.input_scale"] == np.float32(1 / 127)
    assert not model[0]._forward_pre_hooks


def test_layers_that_read_one_value_share_its_int8_form(path: Path) -> None:
    model, x = Each([linear(16, 16), linear(24, 16)]), randn(4, 16)
    write(model, x, path, dense=True, quantize="int8")
    assert nodes(path).count("QuantizeLinear") == 1


def test_rows_and_inputs_of_zeros(path: Path) -> None:
    layer = nn.Linear(16, 16)
    layer.weight.data[3] = 0
    model, x = nn.Sequential(sk.nn.SparseLinear.from_dense(layer, "2:4")), torch.zeros(2, 16)
    write(model, x, path, dense=True, quantize="int8")
    assert constants(path)["0.weight_scale"][3] == constants(path)["0.input_scale"] == 1
    assert_close(run(path, x), results(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_of_the_2_byte_types(dtype: torch.dtype, path: Path) -> None:
    model, x = nn.Sequential(linear(24, 32, dtype=dtype)), randn(3, 32, dtype=dtype)
    write(model, x, path, dense=True, quantize="int8")
    (got,), (expected,) = evaluate(path, x), results(model, x)
    assert got.dtype == dtype
    assert (got.float() - expected.float()).norm() / expected.float().norm() < 0.03
    with pytest.raises(ValueError, match=r"int8 for b?float16 needs opset_version=19 or later"):
        write(model, x, path, dense=True, quantize="int8", opset_version=18)


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = packed(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return sk.linear(x, self.weight)


class Either(nn.Module):
    """A layer that runs on some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(16, 16), linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.shape[0] == 1 else self.second(x)


def test_what_cannot_be_calibrated(path: Path) -> None:
    options: dict[str, Any] = {"dense": True, "quantize": "int8"}
    with pytest.raises(ValueError, match="the range of the input of 'linear', which is no module"):
        write(Function(), randn(2, 16), path, **options)
    with pytest.raises(ValueError, match="'second' did not run on the calibration data"):
        write(Either(), randn(2, 16), path, calibration=[randn(1, 16)], **options)
    for bad in (torch.inf, torch.nan):
        batches = [torch.full((2, 16), bad), torch.ones(2, 16)]
        with pytest.raises(ValueError, match="the input of '0' is not finite on the calibration"):
            write(nn.Sequential(linear(16, 16)), randn(2, 16), path, calibration=batches, **options)
    assert not path.exists()


def test_keyword_arguments(path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(16, 16)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x=x) * scale

    model, x, scale = Named(), randn(2, 16), torch.tensor(2.0)
    options: dict[str, Any] = {"dense": True, "quantize": "int8"}
    write(model, (), path, kwargs={"x": x, "scale": scale}, **options)
    assert constants(path)["layer.input_scale"] == np.float32(x.abs().max() / 127)
    with pytest.raises(ValueError, match="int8 needs calibration where the example has positional"):
        write(model, x, path, kwargs={"scale": scale}, **options)
    calibration = [{"x": 4 * torch.ones(1, 16), "scale": scale}]
    write(
        model,
        x,
        path,
        kwargs={"scale": scale},
        dense=True,
        quantize="int8",
        calibration=calibration,
    )
    assert constants(path)["layer.input_scale"] == np.float32(4 / 127)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "yolo", "audio"])
def test_networks(name: str, path: Path) -> None:
    model, x = network(name)
    always(model, x, fold_batchnorm=True, fuse="all")
    (expected,) = results(model, x)
    write(model, x, path, dense=True, dynamic_shapes=({0: "batch"},))
    assert_close(run(path, x), [expected])
    write(model, x, path, dense=True, quantize="int8", dynamic_shapes=({0: "batch"},))
    (got,) = run(path, x)
    assert (got - expected).norm() / expected.norm() < 0.05
