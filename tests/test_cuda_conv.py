"""Convolutions on a GPU, from `sk.conv2d` down: groups, alignment, gradients, graphs, modules."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cuda_cases import ACTIVATIONS, GPU
from torch import Tensor, nn

import sparsekit as sk
from sparsekit import _native
from sparsekit.gate import measure
from sparsekit.nn import SparseConv2d
from sparsekit.testing import (
    ConvProblem,
    assert_conv2d_close,
    assert_conv2d_exact,
    conv2d_result,
    make_conv_problem,
)
from sparsekit.workload import ConvWorkload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not any(info.op == "conv2d" and info.device == "cuda" for info in _native.kernels()),
        reason="this build has no kernels for convolutions on GPUs",
    ),
]

PATTERNS = ("2:4", "2:4v4", "bsr16x16@0.75", "bsr64x64@0.5")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# kernel, stride, padding, dilation
GEOMETRIES: tuple[tuple[Any, ...], ...] = (
    ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    ((5, 2), (2, 1), (2, 0, 2, 1), (1, 2)),
    ((7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def problem_of(
    geometry: tuple[Any, ...] = GEOMETRIES[2], pattern: str = "2:4", **options: Any
) -> ConvProblem:
    kernel, stride, padding, dilation = geometry
    arguments: dict[str, Any] = {
        "size": (2, 64, 13, 17),
        "out_channels": 128,
        "dtype": torch.float16,
        "integers": True,
        "device": GPU,
        **options,
    }
    return make_conv_problem(
        arguments.pop("size"),
        arguments.pop("out_channels"),
        kernel,
        pattern,
        stride=stride,
        padding=padding,
        dilation=dilation,
        **arguments,
    )


def run(problem: ConvProblem, pattern: str, *epilogue: Any) -> Tensor:
    """Uneven padding, which torch's arguments cannot say, is made before."""
    packed = sk.pack(problem.weight, pattern, groups=problem.groups)
    bias, activation, residual, first = (*epilogue, None, None, None, False)[:4]
    top, left, bottom, right = problem.padding
    x = problem.x
    if (top, left) != (bottom, right):
        x, top, left = nn.functional.pad(x, (left, right, top, bottom)), 0, 0
    return sk.conv2d(
        x,
        packed,
        bias,
        problem.stride,
        (top, left),
        problem.dilation,
        problem.groups,
        activation,
        residual,
        first,
    )


@each_dtype
@each_pattern
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_integers_are_exact(geometry: tuple[Any, ...], pattern: str, dtype: torch.dtype) -> None:
    for channels, rows in ((64, 128), (24, 130), (3, 64), (100, 33)):
        problem = problem_of(
            geometry, pattern, size=(2, channels, 13, 17), out_channels=rows, dtype=dtype
        )
        y = run(problem, pattern, problem.bias, "relu")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_conv2d_exact(y, problem, problem.bias, "relu")


@each_pattern
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_random_data_is_as_close_as_dense(
    activation: str | None, first: bool, pattern: str
) -> None:
    for dtype in DTYPES:
        problem = problem_of(pattern=pattern, dtype=dtype, integers=False)
        epilogue = (problem.bias, activation, problem.residual, first)
        assert_conv2d_close(run(problem, pattern, *epilogue), problem, *epilogue)


@each_pattern
@pytest.mark.parametrize(("channels", "groups"), [(64, 2), (24, 2), (40, 4)])
def test_groups(channels: int, groups: int, pattern: str) -> None:
    """With 40 channels in 4 groups the parts of x are not aligned, and copied."""
    problem = problem_of(pattern=pattern, size=(2, channels, 9, 9), out_channels=256, groups=groups)
    assert_conv2d_exact(run(problem, pattern, problem.bias), problem, problem.bias)
    packed = sk.pack(problem.weight, pattern, groups=groups)
    assert torch.equal(packed.to_dense(), problem.weight)
    assert torch.equal(packed.to("cpu").to_dense(), problem.weight.cpu())
    assert torch.equal(packed.to("cpu").to(GPU).data, packed.data)


def test_any_memory_format() -> None:
    problem = problem_of()
    wide = torch.full((2, 13, 17, 80), torch.nan, dtype=torch.float16, device=GPU)
    for start in (0, 3, 8):
        wide[..., start : start + 64] = problem.x.permute(0, 2, 3, 1)
        x = wide.permute(0, 3, 1, 2)[:, start : start + 64]
        assert_conv2d_exact(run(dataclasses.replace(problem, x=x), "2:4"), problem)
    for x, residual in itertools.product((problem.x, problem.x.contiguous()), (0, 1)):
        added = problem.residual.contiguous() if residual else problem.residual
        y = run(dataclasses.replace(problem, x=x), "2:4", None, None, added)
        assert_conv2d_exact(y, problem, None, None, problem.residual)


@pytest.mark.parametrize("groups", [1, 2])
@each_pattern
def test_gradients_are_those_of_the_dense_layer(pattern: str, groups: int) -> None:
    problem = problem_of(GEOMETRIES[3], pattern, integers=False, groups=groups)
    ours = [t.clone().requires_grad_() for t in (problem.x, problem.bias, problem.residual)]
    theirs = [t.double().requires_grad_() for t in (problem.x, problem.bias, problem.residual)]
    x, bias, residual = ours
    y = run(dataclasses.replace(problem, x=x), pattern, bias, "silu", residual, True)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    x64, bias64, residual64 = theirs
    dense = dataclasses.replace(problem, x=x64)
    conv2d_result(dense, bias64, "silu", residual64, True).backward(upstream.double())
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        error = (mine.grad.double() - right.grad).abs().max()
        assert error <= 4e-3 * right.grad.abs().max()


def layer() -> SparseConv2d:
    torch.manual_seed(0)
    return SparseConv2d.from_dense(
        nn.Conv2d(64, 128, 3, padding=1, groups=2).half().to(GPU), activation="relu"
    )


def x_of(batch: int = 2) -> Tensor:
    return torch.randn(batch, 64, 14, 14, device=GPU, dtype=torch.float16)


def test_a_module_moves_and_copies() -> None:
    module = layer()
    x = x_of()
    expected = module(x)
    other = copy.deepcopy(module).to("cpu").to(GPU)
    assert torch.equal(other(x), expected)
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)


def test_calls_are_captured_in_a_graph() -> None:
    module, x = layer(), x_of()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for _ in range(3):
            x.copy_(x_of())
            graph.replay()
            assert torch.equal(y, module(x))


@pytest.mark.parametrize("channels_last", [True, False])
def test_dense_is_measured(channels_last: bool) -> None:
    packed = sk.pack(torch.randn(128, 64, 3, 3, device=GPU, dtype=torch.float16), "2:4")
    work = ConvWorkload(packed, (2, 64, 14, 14), padding=1, channels_last=channels_last)
    verdict = measure(work)
    assert verdict.fault == ""
    assert verdict.dense_path in ("torch", "torch channels_last")
