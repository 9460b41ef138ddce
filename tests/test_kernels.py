"""Every kernel of the registry that this CPU can run, against exact and float64 references."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import ACTIVATIONS, DTYPES, accepts, available, cases
from torch import Tensor

import sparsekit as sk
from sparsekit import _native, parse_pattern
from sparsekit._native import KernelInfo
from sparsekit.testing import (
    Problem,
    assert_matmul_close,
    assert_matmul_exact,
    make_problem,
)

ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 33, 64, 65, 97, 200)
# Around the tiles of 16, 32 and 64 rows and columns, and sizes that are multiples of nothing.
SHAPES = ((1, 1), (15, 31), (16, 64), (17, 65), (33, 70), (64, 128), (65, 127), (97, 203))


AVAILABLE = available("matmul")
CASES = cases("matmul")
each_case = pytest.mark.parametrize(
    ("kernel", "pattern"), CASES, ids=[f"{kernel.name}-{pattern}" for kernel, pattern in CASES]
)


def run(
    kernel: KernelInfo,
    pattern: str,
    problem: Problem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Run one kernel into the middle of a poisoned buffer, and see that the poison is intact."""
    canonical = _native.compress(problem.weight, problem.mask, parse_pattern(pattern))
    data = _native.pack(canonical, kernel.format)
    m, n = problem.x.shape[0], problem.weight.shape[0]
    poison = -12352.0  # a number of every dtype
    buffer = torch.full((m + 4, n + 40), poison, dtype=problem.x.dtype)
    y = buffer[2 : 2 + m, 20 : 20 + n]
    _native.matmul(problem.x, data, y, bias, activation, residual, kernel=kernel.name)
    result = y.clone()
    y.fill_(poison)
    assert bool((buffer == poison).all()), "the kernel wrote outside its output"
    return result


def test_every_available_kernel_is_tested() -> None:
    assert {kernel.name for kernel in AVAILABLE} == {kernel.name for kernel, _ in CASES}


@each_case
def test_integers_are_exact_for_every_number_of_rows(kernel: KernelInfo, pattern: str) -> None:
    dtype = DTYPES[kernel.dtype]
    for m in ROWS:
        if not accepts(kernel, pattern, m, 33, 70):
            continue
        problem = make_problem(m, 33, 70, pattern, dtype, integers=True, seed=m)
        y = run(kernel, pattern, problem)
        assert_matmul_exact(y, problem.x, problem.weight)


@each_case
def test_integers_are_exact_for_every_shape(kernel: KernelInfo, pattern: str) -> None:
    for (n, k), m in itertools.product(SHAPES, (1, 6, 19)):
        if not accepts(kernel, pattern, m, n, k):
            continue
        problem = make_problem(m, n, k, pattern, DTYPES[kernel.dtype], integers=True, seed=n)
        for bias, residual in itertools.product((None, problem.bias), (None, problem.residual)):
            y = run(kernel, pattern, problem, bias, "relu", residual)
            assert_matmul_exact(y, problem.x, problem.weight, bias, "relu", residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_case
def test_random_data_is_as_close_as_dense(
    kernel: KernelInfo, pattern: str, activation: str | None
) -> None:
    for m in (1, 8, 40):
        if not accepts(kernel, pattern, m, 65, 203):
            continue
        problem = make_problem(m, 65, 203, pattern, DTYPES[kernel.dtype], seed=m)
        # Activations have a tail on either side; make the arguments reach it.
        problem.x.mul_(2)
        for bias, residual in ((None, None), (problem.bias, problem.residual)):
            y = run(kernel, pattern, problem, bias, activation, residual)
            assert_matmul_close(y, problem.x, problem.weight, bias, activation, residual)


@each_case
def test_long_sums_are_as_close_as_dense(kernel: KernelInfo, pattern: str) -> None:
    for m in (1, 32):
        if not accepts(kernel, pattern, m, 64, 3072):
            continue
        problem = make_problem(m, 64, 3072, pattern, DTYPES[kernel.dtype], seed=m)
        y = run(kernel, pattern, problem)
        assert_matmul_close(y, problem.x, problem.weight)


@each_case
def test_rows_may_be_strided(kernel: KernelInfo, pattern: str) -> None:
    for m in (1, 5, 33):
        if not accepts(kernel, pattern, m, 33, 70):
            continue
        problem = make_problem(m, 33, 70, pattern, DTYPES[kernel.dtype], integers=True)
        x = torch.full((m, 91), float("nan"), dtype=problem.x.dtype)
        x[:, 3:73] = problem.x
        residual = torch.full((m, 50), float("nan"), dtype=problem.x.dtype)
        residual[:, 7:40] = problem.residual
        strided = Problem(x[:, 3:73], problem.weight, problem.mask, problem.bias, residual[:, 7:40])
        y = run(kernel, pattern, strided, problem.bias, None, strided.residual)
        assert_matmul_exact(y, problem.x, problem.weight, problem.bias, None, problem.residual)


@each_case
def test_same_threads_same_bits(kernel: KernelInfo, pattern: str) -> None:
    for m in (1, 48):
        if not accepts(kernel, pattern, m, 97, 203):
            continue
        problem = make_problem(m, 97, 203, pattern, DTYPES[kernel.dtype])
        arguments = (problem, problem.bias, "gelu", problem.residual)
        first = run(kernel, pattern, *arguments)
        for _ in range(3):
            assert torch.equal(run(kernel, pattern, *arguments), first)


@pytest.mark.parametrize("threads", [1, 3])
@each_case
def test_any_number_of_threads_is_exact(kernel: KernelInfo, pattern: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (1, 50):
            if accepts(kernel, pattern, m, 97, 203):
                problem = make_problem(m, 97, 203, pattern, DTYPES[kernel.dtype], integers=True)
                y = run(kernel, pattern, problem, problem.bias)
                assert_matmul_exact(y, problem.x, problem.weight, problem.bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "pattern", ["2:4", "2:4v4", "4:16", "bsr16x16@0.75", "bsr16x16@0.9", "bsr1x1@0.9"]
)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_long_sums_stay_within_the_rule(pattern: str, m: int) -> None:
    """Sums of many terms are split into short ones, however few of a row's columns are kept."""
    for seed in range(12):
        problem = make_problem(m, 384, 1536, pattern, torch.float32, seed=seed)
        packed = sk.pack(problem.weight, pattern=pattern, mask=problem.mask)
        y = sk.linear(problem.x, packed, problem.bias)
        assert_matmul_close(y, problem.x, problem.weight, problem.bias)
