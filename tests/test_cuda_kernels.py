"""Every kernel that a GPU of this machine runs, against exact and float64 references."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cuda_cases import (
    ACTIVATIONS,
    CASES,
    GPU,
    KERNELS,
    accepts,
    each_case,
    pack_for,
    problem_on_gpu,
)
from torch import Tensor

from sparsekit import _native, _ops
from sparsekit._native import KernelInfo
from sparsekit.testing import Problem, assert_matmul_close, assert_matmul_exact

pytestmark = pytest.mark.gpu

# Around the tiles of 8, 16, 32, 64, 128 and 256.
ROWS = (0, 1, 2, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 513)
SIZES = (1, 8, 15, 17, 63, 64, 65, 127, 129, 256, 257)


def run(
    kernel: KernelInfo,
    pattern: str,
    problem: Problem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Run one kernel into the middle of a poisoned buffer, and see that the poison is intact."""
    data, header = pack_for(kernel, pattern, problem)
    m, n = problem.x.shape[0], problem.weight.shape[0]
    poison = -12352.0  # a number of every dtype
    buffer = torch.full((m + 4, n + 39), poison, dtype=problem.x.dtype, device=GPU)
    y = buffer[2 : 2 + m, 19 : 19 + n]
    stream = torch.cuda.current_stream(GPU).cuda_stream
    workspace = _ops._workspace(GPU, stream)
    x = _ops._aligned_rows(problem.x)
    call = _native.GpuCall(header, stream, workspace)
    _native.matmul(x, data, y, bias, activation, residual, kernel=kernel.name, gpu=call)
    result = y.clone()
    y.fill_(poison)
    assert bool((buffer == poison).all()), "the kernel wrote outside its output"
    assert not bool(workspace[: _native.CUDA_COUNTER_BYTES].any()), (
        "the kernel left a counter that is not zero"
    )
    return result


def test_every_available_kernel_is_tested() -> None:
    tested = {
        kernel.name
        for kernel, pattern in CASES
        if any(accepts(kernel, pattern, m, 64, 128) for m in (1, 64, 512))
    }
    assert tested == {kernel.name for kernel in KERNELS if kernel.available}


@each_case
def test_integers_are_exact_for_every_number_of_rows(kernel: KernelInfo, pattern: str) -> None:
    for m, (n, k) in itertools.product(ROWS, ((33, 70), (128, 256))):
        if accepts(kernel, pattern, m, n, k):
            problem = problem_on_gpu(kernel, pattern, m, n, k, seed=m)
            y = run(kernel, pattern, problem)
            assert_matmul_exact(y, problem.x, problem.weight)


@each_case
def test_integers_are_exact_for_every_shape(kernel: KernelInfo, pattern: str) -> None:
    for turn, (n, k) in enumerate(itertools.product(SIZES, SIZES)):
        for m in (1, 19, 130):
            if not accepts(kernel, pattern, m, n, k):
                continue
            problem = problem_on_gpu(kernel, pattern, m, n, k, seed=turn)
            bias = problem.bias if turn % 2 else None
            residual = problem.residual if turn % 3 else None
            y = run(kernel, pattern, problem, bias, "relu", residual)
            assert_matmul_exact(y, problem.x, problem.weight, bias, "relu", residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_case
def test_random_data_is_as_close_as_dense(
    kernel: KernelInfo, pattern: str, activation: str | None
) -> None:
    for m, (n, k) in itertools.product((1, 8, 40, 200), ((65, 203), (256, 512))):
        if not accepts(kernel, pattern, m, n, k):
            continue
        problem = problem_on_gpu(kernel, pattern, m, n, k, integers=False, seed=m)
        # Activations have a tail on either side; the arguments reach it.
        problem = dataclasses.replace(problem, x=2 * problem.x)
        for bias, residual in ((None, None), (problem.bias, problem.residual)):
            y = run(kernel, pattern, problem, bias, activation, residual)
            assert_matmul_close(y, problem.x, problem.weight, bias, activation, residual)


@each_case
def test_long_sums_are_as_close_as_dense(kernel: KernelInfo, pattern: str) -> None:
    """Shapes with few results, whose sums several blocks share."""
    for m, n, k in ((1, 64, 16384), (32, 64, 16384), (64, 128, 12288), (300, 300, 4096)):
        if accepts(kernel, pattern, m, n, k):
            problem = problem_on_gpu(kernel, pattern, m, n, k, integers=False, seed=m)
            y = run(kernel, pattern, problem, problem.bias, None, problem.residual)
            assert_matmul_close(y, problem.x, problem.weight, problem.bias, None, problem.residual)


@each_case
def test_a_large_layer_is_exact(kernel: KernelInfo, pattern: str) -> None:
    for m, n, k in ((1, 4096, 4096), (1000, 4100, 1030)):
        if accepts(kernel, pattern, m, n, k):
            problem = problem_on_gpu(kernel, pattern, m, n, k)
            y = run(kernel, pattern, problem, problem.bias, "relu")
            assert_matmul_exact(y, problem.x, problem.weight, problem.bias, "relu")


@each_case
def test_same_inputs_same_bits(kernel: KernelInfo, pattern: str) -> None:
    for m, n, k in ((1, 97, 8192), (48, 97, 203), (500, 300, 1024)):
        if not accepts(kernel, pattern, m, n, k):
            continue
        problem = problem_on_gpu(kernel, pattern, m, n, k, integers=False)
        arguments = (problem, problem.bias, "gelu", problem.residual)
        first = run(kernel, pattern, *arguments)
        for _ in range(5):
            assert torch.equal(run(kernel, pattern, *arguments), first)
