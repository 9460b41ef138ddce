"""Every kernel for convolutions that a GPU of this machine runs, each by its name."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_cases import DTYPES, GPU
from kernel_cases import holds
from test_conv_kernels import GEOMETRIES
from torch import Tensor

from sparsekit import _native, _ops, parse_pattern
from sparsekit._native import KernelInfo
from sparsekit.filters import to_matrix
from sparsekit.testing import (
    ConvProblem,
    assert_conv2d_close,
    assert_conv2d_exact,
    make_conv_problem,
)

pytestmark = pytest.mark.gpu

KERNELS = [info for info in _native.kernels() if info.device == "cuda" and info.op == "conv2d"]
PATTERNS = (
    "2:4",
    "2:4v16",
    "1:4",
    "bsr8x4@0.5",
    "bsr4x1@0.5",
    *(f"bsr{side}x{side}@0.5" for side in (16, 32, 64, 128)),
)


def accepts(kernel: KernelInfo, pattern: str, m: int, n: int, k: int) -> bool:
    candidates = _native.explain(
        kernel.format, parse_pattern(pattern), DTYPES[kernel.dtype], n, k, m, GPU, op="conv2d"
    )
    return any(candidate.kernel == kernel.name and candidate.ok for candidate in candidates)


CASES = [
    (kernel, pattern)
    for kernel, pattern in itertools.product(KERNELS, PATTERNS)
    if holds(kernel.format, pattern, DTYPES[kernel.dtype])
]
each_case = pytest.mark.parametrize(
    ("kernel", "pattern"), CASES, ids=[f"{kernel.name}-{pattern}" for kernel, pattern in CASES]
)


def run(
    kernel: KernelInfo,
    pattern: str,
    problem: ConvProblem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
) -> Tensor | None:
    """Run one kernel into the middle of a poisoned buffer; None where it refuses the problem."""
    kind = parse_pattern(pattern)
    weight, mask = to_matrix(problem.weight, kind).cpu(), to_matrix(problem.mask, kind).cpu()
    (n, k), (batch, _, height, width) = weight.shape, problem.residual.shape
    m = batch * height * width
    if not accepts(kernel, pattern, m, n, k):
        return None
    data = _native.pack(_native.compress(weight, mask, kind), kernel.format)
    header = _native.packed_header(data)
    kernel_size = (problem.weight.shape[2], problem.weight.shape[3])
    shape = _native.Conv2dShape(
        kernel_size, problem.stride, problem.padding[:2], problem.dilation, (height, width)
    )
    poison = -12352.0  # a number of every dtype
    buffer = torch.full((m + 4, n + 39), poison, dtype=problem.x.dtype, device=GPU)
    y = buffer[2 : 2 + m, 19 : 19 + n]
    rows = None if residual is None else residual.permute(0, 2, 3, 1).reshape(m, n)
    x = _ops._aligned_pixels(problem.x.contiguous(memory_format=torch.channels_last))
    stream = torch.cuda.current_stream(GPU).cuda_stream
    workspace = _ops._workspace(GPU, stream)
    call = _native.GpuCall(header, stream, workspace)
    epilogue = (bias, activation, rows, residual_first)
    _native.conv2d(x, k, shape, data.to(GPU), y, *epilogue, kernel=kernel.name, gpu=call)
    result = y.clone().reshape(batch, height, width, n).permute(0, 3, 1, 2)
    y.fill_(poison)
    assert bool((buffer == poison).all()), "the kernel wrote outside its output"
    assert not bool(workspace[: _native.CUDA_COUNTER_BYTES].any()), (
        "the kernel left a counter that is not zero"
    )
    return result


def test_every_available_kernel_is_tested() -> None:
    tested = {kernel.name for kernel, pattern in CASES if accepts(kernel, pattern, 512, 64, 576)}
    assert tested == {kernel.name for kernel in KERNELS if kernel.available}


@each_case
def test_integers_are_exact_for_every_geometry(kernel: KernelInfo, pattern: str) -> None:
    for index, (size, stride, padding, dilation) in enumerate(GEOMETRIES):
        for channels, rows in ((16, 33), (5, 64), (72, 130)):
            problem = make_conv_problem(
                (3, channels, 7, 9),
                rows,
                size,
                pattern,
                DTYPES[kernel.dtype],
                stride,
                padding,
                dilation,
                integers=True,
                seed=index,
                device=GPU,
            )
            y = run(kernel, pattern, problem, problem.bias, "relu6", problem.residual, True)
            if y is not None:
                assert_conv2d_exact(y, problem, problem.bias, "relu6", problem.residual, True)


@each_case
def test_random_data_is_as_close_as_dense_and_repeats(kernel: KernelInfo, pattern: str) -> None:
    for batch, channels, rows, side in ((1, 512, 512, 7), (2, 64, 256, 28), (5, 40, 64, 19)):
        problem = make_conv_problem(
            (batch, channels, side, side),
            rows,
            (3, 3),
            pattern,
            DTYPES[kernel.dtype],
            padding=(1, 1, 1, 1),
            device=GPU,
        )
        y = run(kernel, pattern, problem, problem.bias, "silu", problem.residual)
        if y is None:
            continue
        assert_conv2d_close(y, problem, problem.bias, "silu", problem.residual)
        again = run(kernel, pattern, problem, problem.bias, "silu", problem.residual)
        assert again is not None
        assert torch.equal(again, y)
