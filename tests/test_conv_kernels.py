"""Every kernel for convolutions that this CPU can run, against exact and float64 references."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import ACTIVATIONS, DTYPES, accepts, available, cases
from torch import Tensor

from sparsekit import _native, parse_pattern
from sparsekit._native import KernelInfo
from sparsekit.filters import to_matrix
from sparsekit.testing import (
    ConvProblem,
    assert_conv2d_close,
    assert_conv2d_exact,
    make_conv_problem,
)

AVAILABLE = available("conv2d")
CASES = cases("conv2d")
each_case = pytest.mark.parametrize(
    ("kernel", "pattern"), CASES, ids=[f"{kernel.name}-{pattern}" for kernel, pattern in CASES]
)
# kernel, stride, padding (top, left, bottom, right), dilation
GEOMETRIES: tuple[
    tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int]], ...
] = (
    ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((1, 1), (1, 1), (1, 0, 0, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    ((3, 3), (3, 1), (0, 1, 1, 0), (1, 3)),
    ((7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    ((5, 2), (2, 1), (2, 0, 2, 1), (1, 2)),
    ((1, 5), (1, 1), (0, 2, 0, 2), (1, 1)),
    ((2, 2), (1, 1), (0, 0, 1, 1), (1, 1)),
    # Windows that lie outside the image altogether, and a stride that skips most of it.
    ((3, 2), (1, 2), (4, 3, 5, 4), (1, 1)),
    ((2, 3), (5, 4), (0, 0, 0, 0), (1, 1)),
)


def run(
    kernel: KernelInfo,
    pattern: str,
    problem: ConvProblem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
) -> Tensor:
    """Run one kernel into the middle of a poisoned buffer, and see that the poison is intact."""
    kind = parse_pattern(pattern)
    mask = to_matrix(problem.mask, kind)
    data = _native.pack(
        _native.compress(to_matrix(problem.weight, kind), mask, kind), kernel.format
    )
    batch, n, height, width = problem.residual.shape
    kernel_size = (problem.weight.shape[2], problem.weight.shape[3])
    shape = _native.Conv2dShape(
        kernel_size, problem.stride, problem.padding[:2], problem.dilation, (height, width)
    )
    m = batch * height * width
    poison = -12352.0  # a number of every dtype
    buffer = torch.full((m + 4, n + 40), poison, dtype=problem.x.dtype)
    y = buffer[2 : 2 + m, 20 : 20 + n]
    rows = None if residual is None else residual.permute(0, 2, 3, 1).reshape(m, n)
    _native.conv2d(
        problem.x,
        mask.shape[1],
        shape,
        data,
        y,
        bias,
        activation,
        rows,
        residual_first,
        kernel.name,
    )
    result = y.clone().reshape(batch, height, width, n).permute(0, 3, 1, 2)
    y.fill_(poison)
    assert bool((buffer == poison).all()), "the kernel wrote outside its output"
    return result


def takes(kernel: KernelInfo, pattern: str, problem: ConvProblem) -> bool:
    """Whether the kernel says it can run the problem."""
    n, k = to_matrix(problem.weight, parse_pattern(pattern)).shape
    return accepts(kernel, pattern, problem.residual.numel() // n, n, k)


def test_every_available_kernel_is_tested() -> None:
    assert {kernel.name for kernel in AVAILABLE} == {kernel.name for kernel, _ in CASES}


@each_case
def test_integers_are_exact_for_every_geometry(kernel: KernelInfo, pattern: str) -> None:
    ran = 0
    for index, (size, stride, padding, dilation) in enumerate(GEOMETRIES):
        # No number of channels is a multiple of a tile in all of them.
        channels, rows = ((16, 33), (5, 64), (24, 17))[index % 3]
        problem = make_conv_problem(
            (2, channels, 7, 9),
            rows,
            size,
            pattern,
            DTYPES[kernel.dtype],
            stride,
            padding,
            dilation,
            integers=True,
            seed=index,
        )
        if takes(kernel, pattern, problem):
            assert_conv2d_exact(run(kernel, pattern, problem), problem)
            ran += 1
    assert ran


@each_case
def test_integers_are_exact_for_every_number_of_channels(kernel: KernelInfo, pattern: str) -> None:
    for channels, rows in itertools.product((1, 2, 3, 5, 8, 15, 31, 40, 65), (1, 16, 65)):
        # Taps of 1x1 filters are not padded.
        for size, stride, padding in (((2, 2), 1, (1, 0, 0, 1)), ((1, 1), 2, (0, 0, 0, 0))):
            problem = make_conv_problem(
                (1, channels, 3, 4),
                rows,
                size,
                pattern,
                DTYPES[kernel.dtype],
                (stride, stride),
                padding,
                integers=True,
                seed=channels,
            )
            if takes(kernel, pattern, problem):
                assert_conv2d_exact(run(kernel, pattern, problem), problem)


@each_case
def test_integers_are_exact_for_every_number_of_pixels(kernel: KernelInfo, pattern: str) -> None:
    """Around the tiles of 8, 16, 32 and 64, in one line, and across lines and images."""
    sizes = [(1, 1, pixels) for pixels in (1, 2, 5, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65, 130)]
    sizes += [(3, 3, 7), (5, 1, 13), (9, 11, 1), (2, 8, 8), (0, 3, 3)]
    for batch, height, width in sizes:
        problem = make_conv_problem(
            (batch, 16, height, width),
            17,
            (1, 3),
            pattern,
            DTYPES[kernel.dtype],
            padding=(0, 1, 0, 1),
            integers=True,
            seed=width,
        )
        if takes(kernel, pattern, problem):
            assert_conv2d_exact(run(kernel, pattern, problem), problem)


@each_case
def test_every_epilogue_is_exact_on_integers(kernel: KernelInfo, pattern: str) -> None:
    problem = make_conv_problem(
        (2, 16, 5, 4), 33, (3, 3), pattern, DTYPES[kernel.dtype], padding=(1,) * 4, integers=True
    )
    if not takes(kernel, pattern, problem):
        return
    for activation, bias, residual, first in itertools.product(
        (None, "relu", "relu6"), (None, problem.bias), (None, problem.residual), (False, True)
    ):
        epilogue = (bias, activation, residual, first)
        assert_conv2d_exact(run(kernel, pattern, problem, *epilogue), problem, *epilogue)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_case
def test_random_data_is_as_close_as_dense(
    kernel: KernelInfo, pattern: str, activation: str | None
) -> None:
    problem = make_conv_problem(
        (2, 40, 5, 6), 65, (3, 3), pattern, DTYPES[kernel.dtype], padding=(1,) * 4
    )
    if not takes(kernel, pattern, problem):
        return
    # Activations have a tail on either side; make the arguments reach it.
    problem.x.mul_(0.7)
    for bias, residual, first in (
        (None, None, False),
        (problem.bias, problem.residual, False),
        (problem.bias, problem.residual, True),
    ):
        epilogue = (bias, activation, residual, first)
        assert_conv2d_close(run(kernel, pattern, problem, *epilogue), problem, *epilogue)


@each_case
def test_long_sums_are_as_close_as_dense(kernel: KernelInfo, pattern: str) -> None:
    problem = make_conv_problem((1, 256, 3, 4), 64, (3, 3), pattern, DTYPES[kernel.dtype])
    if takes(kernel, pattern, problem):
        assert_conv2d_close(run(kernel, pattern, problem), problem)


def spaced(x: Tensor, images: int, lines: int, pixels: int, channels: int) -> Tensor:
    """x with NaN between its images, lines, pixels and behind its channels."""
    batch, c, height, width = x.shape
    wide = torch.full(
        (batch * images, height + lines, width + pixels, c + channels), torch.nan, dtype=x.dtype
    )
    view = wide[::images, :height, :width, channels // 2 : channels // 2 + c].permute(0, 3, 1, 2)
    return view.copy_(x)


@each_case
def test_what_lies_between_the_pixels_is_not_read(kernel: KernelInfo, pattern: str) -> None:
    for gaps, channels, size in itertools.product(
        ((1, 0, 0, 3), (2, 0, 0, 0), (1, 2, 0, 0), (1, 0, 3, 0), (2, 1, 1, 7)),
        (5, 16),
        ((3, 3), (1, 1)),
    ):
        problem = make_conv_problem(
            (3, channels, 5, 6),
            33,
            size,
            pattern,
            DTYPES[kernel.dtype],
            padding=(size[0] // 2,) * 4,
            integers=True,
        )
        if takes(kernel, pattern, problem):
            gappy = dataclasses.replace(problem, x=spaced(problem.x, *gaps))
            assert_conv2d_exact(run(kernel, pattern, gappy), problem)


@pytest.mark.parametrize("threads", [1, 3])
@each_case
def test_any_number_of_threads_is_exact_and_repeats(
    kernel: KernelInfo, pattern: str, threads: int
) -> None:
    exact = make_conv_problem(
        (2, 24, 6, 5),
        97,
        (3, 3),
        pattern,
        DTYPES[kernel.dtype],
        padding=(1,) * 4,
        integers=True,
    )
    random = make_conv_problem(
        (2, 24, 6, 5), 97, (3, 3), pattern, DTYPES[kernel.dtype], padding=(1,) * 4
    )
    if not takes(kernel, pattern, exact):
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_conv2d_exact(run(kernel, pattern, exact, exact.bias), exact, exact.bias)
        epilogue = (random.bias, "gelu", random.residual)
        first = run(kernel, pattern, random, *epilogue)
        for _ in range(2):
            assert torch.equal(run(kernel, pattern, random, *epilogue), first)
    finally:
        torch.set_num_threads(before)
