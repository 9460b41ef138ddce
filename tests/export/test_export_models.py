"""Whole networks with trained weights or of real size, as users export them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from conv_models import prune, shake
from export_cases import array, attributes, evaluate, results, sparse_nodes, tensor, write
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.demo import encoder

Inputs = tuple[Tensor, ...]


def minilm() -> tuple[nn.Module, Any, list[Inputs]]:
    model = encoder.load_dense()
    sk.prune(model, "2:4", targets=encoder.ENCODER_LINEARS, progress=False)
    tokenizer = encoder.load_tokenizer()
    texts = (
        ["A cat sat on the mat.", "Hello"],
        ["Sparse kernels", "run faster than dense", "ones"],
    )
    batches = [tuple(encoder.tokenize(tokenizer, each).values()) for each in texts]
    sk.convert(
        model, "2:4", batches[0], targets=encoder.ENCODER_LINEARS, gate="always", progress=False
    )
    sizes = {0: "batch", 1: "seq"}
    return model, (sizes, sizes), batches


def resnet18() -> tuple[nn.Module, Any, list[Inputs]]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = prune(shake(torchvision.models.resnet18(num_classes=10))).eval()
    images = torch.randn(3, 3, 48, 48)
    options: dict[str, Any] = {"fold_batchnorm": True, "fuse": "all"}
    sk.convert(model, "2:4", images, gate="always", progress=False, **options)
    return model, ({0: "batch"},), [(images[:2],), (images,)]


MAKERS = {"minilm": (minilm, 36), "resnet18": (resnet18, 21)}


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, list[Inputs], int]:
    make, layers = MAKERS[request.param]
    return (*make(), layers)


def run(path: Path, inputs: Inputs) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = dict(zip(names, map(array, inputs), strict=True))
    return tensor(session.run(None, feeds)[0])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_sparse(case: Any, tmp_path: Path) -> None:
    model, sizes, batches, layers = case
    path = tmp_path / "model.onnx"
    before = copy.deepcopy(model.state_dict())
    report = write(model, batches[0], path, dynamic_shapes=sizes)
    assert len(report.rows) == layers
    assert report.absent == []
    onnx.checker.check_model(str(path), full_check=True)
    for inputs in batches:
        (got,), (expected,) = evaluate(path, *inputs), results(model, *inputs)
        # Layers in between are ONNX's in float32; ours are the same bits.
        assert relative(got, expected) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Shapes can be made anew; behind BERT's Reshapes ONNX knows the batch by names of its own.
    file = onnx.load(path)
    del file.graph.value_info[:]
    again = onnx.shape_inference.infer_shapes(file, strict_mode=True)
    found = [*again.graph.value_info, *again.graph.output]
    shapes = {value.name: value.type.tensor_type.shape.dim for value in found}
    for node in sparse_nodes(file):
        dims, n = shapes[node.output[0]], attributes(node)["n"]
        assert dims[0].dim_param
        assert (dims[1] if node.op_type == "SparseConv2d" else dims[-1]).dim_value == n


def test_dense(case: Any, tmp_path: Path) -> None:
    model, sizes, batches, layers = case
    path = tmp_path / "model.onnx"
    report = write(model, batches[0], path, dense=True, dynamic_shapes=sizes)
    assert len(report.rows) == layers
    for inputs in batches:
        assert relative(run(path, inputs), results(model, *inputs)[0]) < 1e-5


def test_int8(case: Any, tmp_path: Path) -> None:
    model, sizes, batches, _ = case
    path = tmp_path / "model.onnx"
    options = {"quantize": "int8", "calibration": batches, "dynamic_shapes": sizes}
    write(model, batches[0], path, dense=True, **options)
    for inputs in batches:
        error = relative(run(path, inputs), results(model, *inputs)[0])
        assert 1e-4 < error < 0.2
