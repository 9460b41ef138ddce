"""What we export, run by the TensorRT plugins: their kernels on the emulator, without TensorRT.

`make tensorrt` builds the program and says where it is; its format of a case is described in
tests/plugin/test_exported.cc.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_models import always
from export_cases import (
    ACTIVATIONS,
    array,
    attributes,
    conv,
    linear,
    randn,
    sparse_nodes,
    write,
)
from export_cases import constants as constants_of
from torch import Tensor, nn
from torch.nn import functional

import sparsekit as sk
from sparsekit.workload import activate

_FOLDER = "SPARSEKIT_TENSORRT_TESTS"
_BUILT = Path(__file__).parents[2] / "build/tensorrt/tests/plugin"
_DIGITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@pytest.fixture(scope="module")
def program() -> list[str]:
    """The program, and the plugins it loads."""
    named = os.environ.get(_FOLDER)
    folder = Path(named) if named else _BUILT
    parts = [folder / "tensorrt_exported", folder / "libsparsekit_tensorrt_emulated.so"]
    if not named and not parts[0].exists():
        pytest.skip("the plugins' tests are not built: make tensorrt TENSORRT_INCLUDE_DIR=…")
    for part in parts:
        assert part.exists(), f"{_FOLDER}={named}: there is no {part}"
    return [str(part) for part in parts]


@dataclass
class Layer:
    """What a node must compute, in torch's words."""

    weight: Tensor  # dense
    bias: Tensor | None = None
    activation: str | None = None
    residual_first: bool = False
    geometry: dict[str, Any] = field(default_factory=dict)  # of functional.conv2d

    def sums(self, x: Tensor, size: bool = False) -> Tensor:
        """`x · Wᵀ + bias` in float64; `size`: of all magnitudes."""
        parts = [
            None if part is None else part.detach().double() for part in (x, self.weight, self.bias)
        ]
        x, weight, bias = (part if part is None or not size else part.abs() for part in parts)
        if weight.dim() == 2:
            return functional.linear(x, weight, bias)
        if weight.dim() == 3:  # a node knows images only
            weight = weight.unsqueeze(2)
        return functional.conv2d(x, weight, bias, **self.geometry)

    def result(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """y in float64, and how far sums in float32 and one rounding may lead from it.

        The bound of tests/cpp/test_matmul.cc, for any order of the sums.
        """
        unit, columns = 2.0**-24, self.weight[0].numel()
        sums, size = self.sums(x), self.sums(x, size=True)
        after = torch.zeros_like(sums) if residual is None else residual.double()
        if self.residual_first:
            sums, size, after = sums + after, size + after.abs(), torch.zeros_like(sums)
        y = activate(sums, self.activation) + after
        rounding = 1.01 * y.abs() * 2.0 ** -_DIGITS[x.dtype] + 2.0**-25
        allowed = 1.13 * (columns + 3) * unit * size + 16 * unit * sums.abs() + rounding
        return y, allowed + unit * after.abs()


def of_linear(layer: sk.nn.SparseLinear) -> Layer:
    return Layer(layer.to_dense().weight, layer.bias, layer.activation)


def of_conv(layer: Any, residual_first: bool = False) -> Layer:
    def pair(value: Any, least: int) -> tuple[int, int]:
        one = (value, value) if isinstance(value, int) else tuple(value)
        return (least, one[0]) if layer.dims == 1 else (one[0], one[1])

    geometry = {
        "stride": pair(layer.stride, 1),
        "padding": pair(layer.padding, 0),
        "dilation": pair(layer.dilation, 1),
        "groups": layer.groups,
    }
    weight = layer.to_dense().weight
    return Layer(weight, layer.bias, layer.activation, residual_first, geometry)


def case_bytes(file: Path, x: Tensor, residual: Tensor | None, layer: Layer) -> bytes:
    """The only sparse node of a file, with what it reads and must write."""
    (node,) = sparse_nodes(file)
    lines = [f"op {node.op_type}"]
    for name, value in attributes(node).items():
        if isinstance(value, bytes):
            lines.append(f"text {name} {value.decode()}")
        else:
            numbers = value if isinstance(value, list) else [value]
            lines.append(f"ints {name} " + " ".join(map(str, numbers)))
    assert len(node.input) == (2 if residual is None else 3)
    y, allowed = layer.result(x, residual)
    tensors = {"x": array(x), "weight": constants_of(file)[node.input[1]]}
    if residual is not None:
        tensors["residual"] = array(residual)
    tensors |= {"y": y.numpy(), "allowed": allowed.numpy()}
    for name, values in tensors.items():
        lines.append(f"tensor {name} " + " ".join(map(str, values.shape)))
    text = "\n".join(lines) + "\n\n"
    return text.encode() + b"".join(values.tobytes() for values in tensors.values())


def check(
    program: list[str],
    folder: Path,
    model: nn.Module,
    layer: Layer,
    x: Tensor,
    weights: str = "canonical",
    residual: Callable[[Tensor], Tensor] | None = None,
) -> str:
    """Export, run the node, compare; returns the weight's format."""
    file, case = folder / "model.onnx", folder / "case"
    report = write(model, x, file, weights=weights)
    images = x.unsqueeze(2) if layer.weight.dim() == 3 else x
    case.write_bytes(case_bytes(file, images, residual and residual(images), layer))
    done = subprocess.run([*program, str(case)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{case}: right\n"
    return report.rows[0].format


WEIGHTS = pytest.mark.parametrize("weights", ["canonical", "cuda"])
LINEAR = [
    ("2:4", torch.float16, "nm_mma_sp"),
    ("2:4v4", torch.bfloat16, "nm_mma_sp"),
    ("1:4", torch.float16, "nm"),
    ("bsr16x16@0.5", torch.float16, "bsr_mma"),
    ("bsr4x1@0.5", torch.bfloat16, "bsr"),
    ("2:4", torch.float32, "nm"),
    ("bsr16x16@0.5", torch.float32, "bsr"),
]


def expected_format(weights: str, packed_format: str) -> str:
    return "canonical" if weights == "canonical" else packed_format


@WEIGHTS
@pytest.mark.parametrize(("pattern", "dtype", "packed_format"), LINEAR)
def test_linear(
    pattern: str,
    dtype: torch.dtype,
    packed_format: str,
    weights: str,
    program: list[str],
    tmp_path: Path,
) -> None:
    layer = linear(40, 72, pattern, dtype, "gelu")
    x = randn(2, 9, 72, dtype=dtype)
    found = check(program, tmp_path, layer, of_linear(layer), x, weights)
    assert found == expected_format(weights, packed_format)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str | None, program: list[str], tmp_path: Path) -> None:
    layer = linear(24, 32, "2:4", torch.float16, activation, bias=activation is not None)
    x = 3 * randn(5, 32, dtype=torch.float16)
    check(program, tmp_path, layer, of_linear(layer), x)


@WEIGHTS
@pytest.mark.parametrize(("pattern", "dtype", "packed_format"), LINEAR)
def test_conv2d_with_groups(
    pattern: str,
    dtype: torch.dtype,
    packed_format: str,
    weights: str,
    program: list[str],
    tmp_path: Path,
) -> None:
    options = {"groups": 2, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    layer = conv((64, 16, 3, 3), pattern, dtype, activation="relu", **options)
    x = randn(2, 32, 9, 7, dtype=dtype)
    found = check(program, tmp_path, layer, of_conv(layer), x, weights)
    assert found == expected_format(weights, packed_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [6, 12, 16])
def test_channels_that_fill_up_no_16_bytes(
    channels: int, dtype: torch.dtype, program: list[str], tmp_path: Path
) -> None:
    layer = conv((20, channels, 3, 3), "2:4", dtype, groups=2, padding=1)
    x = randn(1, 2 * channels, 5, 6, dtype=dtype)
    check(program, tmp_path, layer, of_conv(layer), x)


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d(weights: str, dtype: torch.dtype, program: list[str], tmp_path: Path) -> None:
    layer = conv((32, 16, 5), "2:4", dtype, stride=2, padding=2, activation="silu")
    x = randn(2, 16, 21, dtype=dtype)
    check(program, tmp_path, layer, of_conv(layer), x, weights)


class Shortcut(nn.Module):
    """The end of a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x)


@WEIGHTS
def test_a_block_of_a_converted_network(weights: str, program: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Shortcut().eval(), randn(2, 16, 6, 5)
    model.bn.running_var.uniform_(0.5, 2)
    model.bn.running_mean.uniform_(-1, 1)
    always(model, x, fold_batchnorm=True, fuse="all")
    layer: Any = model.conv
    expected = of_conv(layer, residual_first=True)
    expected.activation = "relu"  # fused into it
    check(program, tmp_path, model, expected, x, weights, residual=lambda images: images)


class Functions(nn.Module):
    def __init__(self, dtype: torch.dtype, first: bool | None) -> None:
        super().__init__()
        shape = (32, 32) if first is None else (32, 32, 3, 3)
        self.weight, self.first = sk.pack(randn(*shape, dtype=dtype), "2:4"), first
        self.bias = nn.Buffer(randn(32, dtype=dtype, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.first is None:
            return sk.linear(x, weight, bias, "silu", residual=x)
        return sk.conv2d(
            x, weight, bias, padding=1, activation="silu", residual=x, residual_first=self.first
        )


@pytest.mark.parametrize("first", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_functions_with_a_residual(
    dtype: torch.dtype, first: bool | None, program: list[str], tmp_path: Path
) -> None:
    model = Functions(dtype, first)
    dense = model.weight.to_dense()
    layer = Layer(dense, model.bias, "silu", bool(first), {} if first is None else {"padding": 1})
    x = randn(70, 32, dtype=dtype) if first is None else randn(2, 32, 5, 6, dtype=dtype)
    check(program, tmp_path, model, layer, x, residual=lambda same: same)


def test_the_program_tells_right_from_wrong(program: list[str], tmp_path: Path) -> None:
    model = linear(16, 32, "2:4", torch.float16)
    layer = of_linear(model)
    layer.bias = layer.bias + 2**-5
    with pytest.raises(AssertionError, match=r"y\[0\] is .*, expected .* within 0\.0"):
        check(program, tmp_path, model, layer, randn(4, 32, dtype=torch.float16))
