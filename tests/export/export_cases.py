"""Models of one kind of layer, and how to run the files that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.export import ExportReport

PATTERNS = (
    "2:4",
    "2:4v4",
    "1:4",
    "3:8v16",
    "5:16",
    "bsr16x16@0.5",
    "bsr32x16@0.75",
    "bsr4x1@0.5",
    "bsr16x16@1.0",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "relu6")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def packed(
    n: int, k: int, pattern: str = "2:4", dtype: torch.dtype = torch.float32, seed: int = 0
) -> sk.PackedWeight:
    return sk.pack(randn(n, k, dtype=dtype, seed=seed), pattern)


def linear(
    n: int,
    k: int,
    pattern: str = "2:4",
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    bias: bool = True,
    seed: int = 0,
) -> sk.nn.SparseLinear:
    values = randn(n, dtype=dtype, seed=seed + 1) if bias else None
    return sk.nn.SparseLinear(packed(n, k, pattern, dtype, seed), values, activation)


def conv(
    shape: Sequence[int],
    pattern: str = "2:4",
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
    **options: Any,
) -> Any:
    weight = sk.pack(randn(*shape, dtype=dtype), pattern, groups=groups)
    kind = sk.nn.SparseConv2d if len(shape) == 4 else sk.nn.SparseConv1d
    return kind(weight, randn(shape[0], dtype=dtype, seed=1), **options)


class Each(nn.Module):
    """Every layer reads the same input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def write(model: nn.Module, args: Any, path: Path, **options: Any) -> ExportReport:
    return sk.export.onnx(model, args, path, progress=False, **options)


def array(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tensor(values: Any) -> Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


class GatherElements(OpRun):
    """ONNX's own fails where an axis is longer than 64, as that of BERT's position buffer."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


def evaluate(file: Path | onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    """The outputs, by ONNX's reference evaluator and our operators."""
    source = str(file) if isinstance(file, Path) else file
    evaluator = ReferenceEvaluator(source, new_ops=[*sk.export.reference_ops(), GatherElements])
    feeds = dict(zip(evaluator.input_names, map(array, inputs), strict=True))
    return [tensor(np.asarray(value)) for value in evaluator.run(None, feeds)]


def results(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        value = model(*inputs)
    return list(value) if isinstance(value, tuple) else [value]


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other), f"up to {(one.float() - other.float()).abs().max()}"


def sparse_nodes(file: Path | onnx.ModelProto) -> list[onnx.NodeProto]:
    model = onnx.load(file) if isinstance(file, Path) else file
    return [node for node in model.graph.node if node.domain == "sparsekit"]


def constants(file: Path | onnx.ModelProto) -> dict[str, Any]:
    model = onnx.load(file) if isinstance(file, Path) else file
    return {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
