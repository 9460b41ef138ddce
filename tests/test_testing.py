"""The rule for convolutions: what it accepts and what it does not."""

from __future__ import annotations

import pytest
import torch

from sparsekit.testing import (
    ConvProblem,
    assert_conv2d_close,
    assert_conv2d_exact,
    conv2d_result,
    make_conv_problem,
)


def problem_of(integers: bool, dtype: torch.dtype = torch.float32) -> ConvProblem:
    return make_conv_problem(
        (2, 4, 5, 6),
        8,
        (3, 2),
        "2:4",
        dtype,
        stride=(2, 1),
        padding=(1, 0, 2, 1),
        dilation=(1, 2),
        groups=2,
        integers=integers,
    )


def test_the_reference_is_the_definition() -> None:
    problem = problem_of(True)
    y = conv2d_result(problem, problem.bias, "relu6", problem.residual, residual_first=True)
    assert y.shape == (2, 8, 3, 5)
    for image, row, p, q in ((0, 0, 0, 0), (1, 7, 2, 4), (1, 3, 1, 2), (0, 4, 2, 0)):
        total = problem.bias[row] + problem.residual[image, row, p, q]
        for c in range(2):
            for r in range(3):
                for s in range(2):
                    line, place = 2 * p - 1 + r, q + 2 * s
                    if 0 <= line < 5 and place < 6:
                        channel = row // 4 * 2 + c
                        total = total + (
                            problem.weight[row, c, r, s] * problem.x[image, channel, line, place]
                        )
        assert y[image, row, p, q] == total.clamp(0, 6)


def test_integers_must_be_exact() -> None:
    problem = problem_of(True)
    y = conv2d_result(problem, None, None, problem.residual).float()
    assert_conv2d_exact(y, problem, None, None, problem.residual)
    y[1, 2, 1, 3] += 1
    with pytest.raises(AssertionError, match=r"1 of 240 results differ, first at \(1, 2, 1, 3\)"):
        assert_conv2d_exact(y, problem, None, None, problem.residual)
    with pytest.raises(AssertionError, match="shape"):
        assert_conv2d_exact(y[:1], problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_may_be_twice_those_of_dense(dtype: torch.dtype) -> None:
    problem = problem_of(False, dtype)
    epilogue = (problem.bias, "gelu", problem.residual)
    right = conv2d_result(problem, *epilogue)
    assert_conv2d_close(right.to(dtype), problem, *epilogue)
    assert_conv2d_close(conv2d_result(problem, *epilogue, dtype=dtype), problem, *epilogue)
    wrong = right + 8 * torch.finfo(dtype).eps * right.abs().max()
    with pytest.raises(AssertionError, match="the error against float64 is"):
        assert_conv2d_close(wrong.to(dtype), problem, *epilogue)
    with pytest.raises(AssertionError, match="NaN or an infinity"):
        assert_conv2d_close(torch.full_like(right, torch.nan).to(dtype), problem, *epilogue)
    with pytest.raises(AssertionError, match=r"dtype torch\.float64"):
        assert_conv2d_close(right, problem, *epilogue)
