"""Convolutions in ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conv_models import always, network
from export_cases import (
    ACTIVATIONS,
    DTYPES,
    Each,
    assert_same_bits,
    attributes,
    conv,
    evaluate,
    packed,
    randn,
    results,
    sparse_nodes,
    write,
)
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.export import reference
from sparsekit.export.nodes import Window
from sparsekit.export.weights import encode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def layers(dtype: torch.dtype) -> list[nn.Module]:
    """Every kind of geometry, with every family of patterns."""
    return [
        conv((24, 16, 3, 3), "2:4", dtype, padding=1),
        conv((24, 16, 1, 1), "2:4v4", dtype),
        conv((24, 16, 3, 2), "1:4", dtype, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        conv((24, 8, 3, 3), "2:4", dtype, groups=2, activation="relu"),
        conv((32, 4, 4, 2), "2:4v8", dtype, groups=4, padding="same"),
        conv((32, 16, 3, 3), "bsr16x16@0.5", dtype, stride=2, padding=2),
        conv((32, 8, 2, 2), "bsr16x8@0.5", dtype, groups=2, activation="silu"),
        conv((24, 16, 3, 3), "bsr4x1@0.75", dtype, padding=1, padding_mode="reflect"),
        conv((32, 16, 3, 3), "bsr16x16@1.0", dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_geometry(dtype: torch.dtype, path: Path) -> None:
    model, x = Each(layers(dtype)), randn(2, 16, 9, 11, dtype=dtype)
    write(model, x, path, dynamic_shapes=({0: "batch", 2: "height", 3: "width"},))
    for shape in ((2, 16, 9, 11), (1, 16, 12, 7), (0, 16, 9, 9)):
        x = randn(*shape, dtype=dtype)
        assert_same_bits(evaluate(path, x), results(model, x))


def test_asymmetric_padding_and_groups_are_written_as_they_are(path: Path) -> None:
    write(
        conv((32, 4, 4, 2), "2:4", groups=4, padding="same", dilation=(1, 3)),
        randn(1, 16, 9, 9),
        path,
    )
    found = attributes(sparse_nodes(path)[0])
    assert (found["n"], found["k"], found["channels"], found["group"]) == (32, 64, 4, 4)
    assert found["kernel_shape"] == [4, 2]
    assert found["pads"] == [1, 1, 2, 2]
    assert (found["strides"], found["dilations"]) == ([1, 1], [1, 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(dtype: torch.dtype, path: Path) -> None:
    model = Each([conv((8, 8, 3, 3), "2:4", dtype, activation=name) for name in ACTIVATIONS])
    x = 3 * randn(2, 8, 6, 6, dtype=dtype)
    write(model, x, path)
    assert_same_bits(evaluate(path, x), results(model, x))


def test_conv1d(path: Path) -> None:
    model = Each(
        [
            conv((16, 8, 5), "2:4", stride=2, padding=2),
            conv((16, 4, 3), "bsr8x4@0.5", groups=2, dilation=2, padding="same"),
        ]
    )
    x = randn(2, 8, 20)
    write(model, x, path, dynamic_shapes=({0: "batch", 2: "length"},))
    assert [attributes(node)["kernel_shape"] for node in sparse_nodes(path)] == [[1, 5], [1, 3]]
    for sound in (x, randn(1, 8, 33), randn(0, 8, 20)):
        assert_same_bits(evaluate(path, sound), results(model, sound))


class Residual(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer, self.first = conv((8, 8, 3, 3), padding=1, activation="relu"), first

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, residual=x, residual_first=self.first)


@pytest.mark.parametrize("first", [False, True])
def test_residual_before_and_after_the_activation(first: bool, path: Path) -> None:
    model, x = Residual(first), randn(2, 8, 5, 5)
    write(model, x, path, dynamic_shapes=({0: "batch"},))
    assert attributes(sparse_nodes(path)[0])["residual_first"] == first
    for images in (x, randn(3, 8, 5, 5)):
        assert_same_bits(evaluate(path, images), results(model, images))


def test_functions_and_single_images(path: Path) -> None:
    weight = sk.pack(randn(16, 4, 3, 3), "2:4", groups=2)
    line = sk.pack(randn(16, 16, 3), "2:4")

    class Functions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = sk.conv2d(x, weight, padding=1, groups=2, activation="relu6")
            return sk.conv1d(y.flatten(2), line)

    images = randn(2, 8, 5, 5)
    write(Functions(), images, path)
    assert_same_bits(evaluate(path, images), results(Functions(), images))
    image = conv((8, 8, 3, 3))
    write(image, randn(8, 5, 5), path)
    assert_same_bits(evaluate(path, randn(8, 5, 5)), results(image, randn(8, 5, 5)))


@pytest.mark.parametrize("pattern", ["2:4", "bsr16x16@0.5"])
def test_packed_for_gpus(pattern: str, path: Path) -> None:
    first = conv((64, 16, 3, 3), pattern, torch.float16, padding=1)
    model = nn.Sequential(first, conv((64, 32, 3, 3), pattern, torch.float16, groups=2))
    x = randn(2, 16, 6, 6, dtype=torch.float16)
    report = write(model, x, path, weights="cuda")
    expected = "nm_mma_sp" if pattern == "2:4" else "bsr_mma"
    assert [row.format for row in report.rows] == [expected] * 2
    assert_same_bits(evaluate(path, x), results(model, x))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "yolo", "audio"])
def test_networks_with_everything_fused(name: str, path: Path) -> None:
    model, x = network(name)
    converted = always(model, x, fold_batchnorm=True, fuse="all")
    report = write(model, x, path, dynamic_shapes=({0: "batch"},))
    assert sorted(row.layer for row in report.rows) == sorted(converted.sparse)
    assert report.absent == []
    fused = [row.layer for row in converted.rows if row.residual]
    assert sorted(row.layer for row in report.rows if row.residual) == sorted(fused)
    assert bool(fused) == (name in ("resnet", "mobilenet"))
    for images in (x, x[:1]):
        torch.testing.assert_close(
            evaluate(path, images), results(model, images), rtol=1e-5, atol=1e-6
        )


def run(node_changes: dict[str, object], x: Tensor, residual: Tensor | None = None) -> None:
    weight = sk.pack(randn(16, 8, 3, 3), "2:4")
    window = Window(8, (3, 3), (1, 1), (1, 1), (0, 0, 0, 0), 1)
    node, words = encode(weight.canonical(), None, None, False, window)
    made = helper.make_node(
        "SparseConv2d", ["x", "w"], ["y"], domain="sparsekit", **(node.attributes() | node_changes)
    )
    params = {"log": lambda *_: None, "opsets": {"": 20}, "new_ops": None}
    inputs = [x.numpy(), words.numpy()] + ([] if residual is None else [residual.numpy()])
    reference.SparseConv2d(made, params).run(*inputs)


def test_what_a_node_refuses_when_it_runs() -> None:
    run({}, randn(2, 8, 5, 5), randn(2, 16, 3, 3))
    with pytest.raises(ValueError, match=r"x has shape \[2, 9, 5, 5\], expected \[N, 8, H, W\]"):
        run({}, randn(2, 9, 5, 5))
    with pytest.raises(ValueError, match=r"x has shape \[8, 5, 5\], expected \[N, 8, H, W\]"):
        run({}, randn(8, 5, 5))
    with pytest.raises(ValueError, match=r"x has shape \[2, 8, 2, 5\], which the kernel does not"):
        run({}, randn(2, 8, 2, 5))
    with pytest.raises(ValueError, match=r"x has shape \[2, 8, 0, 5\], which the kernel does not"):
        run({"pads": (5, 5, 5, 5)}, torch.empty(2, 8, 0, 5))
    with pytest.raises(ValueError, match="x is float16, dtype says float32"):
        run({}, randn(2, 8, 5, 5).half())
    with pytest.raises(ValueError, match=r"residual has shape .*5\], expected \[2, 16, 3, 3\]"):
        run({}, randn(2, 8, 5, 5), randn(2, 16, 5, 5))
    with pytest.raises(ValueError, match="residual is float16, dtype says float32"):
        run({}, randn(2, 8, 5, 5), randn(2, 16, 3, 3).half())
    with pytest.raises(ValueError, match="SparseConv2d: the node has group=0"):
        run({"group": 0}, randn(2, 8, 5, 5))


def test_a_weight_of_another_type_is_refused() -> None:
    node, words = encode(packed(8, 8).canonical(), None, None, False, None)
    with pytest.raises(ValueError, match="SparseLinear: expected weight as int32, got uint8"):
        reference._Layer("SparseLinear", dict(node.attributes()), words.numpy().view(np.uint8))


def test_the_weight_is_packed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(conv((8, 8, 3, 3)), randn(1, 8, 5, 5), path)
    calls = []
    real = reference.decode
    monkeypatch.setattr(reference, "decode", lambda *a: calls.append(a) or real(*a))
    evaluator = ReferenceEvaluator(str(path), new_ops=sk.export.reference_ops())
    for seed in range(3):
        evaluator.run(None, {evaluator.input_names[0]: randn(1, 8, 5, 5, seed=seed).numpy()})
    assert len(calls) == 1
