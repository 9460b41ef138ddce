"""When a result is right: problems, float64 references and the tolerance rule.

Used by the tests and the benchmarks, so that there is one rule and no fitted tolerance:

1. On small integers every partial sum is exact, and so must be the result (`assert_matmul_exact`,
   `assert_conv2d_exact`).
2. On random data the error against float64 may be at most twice that of torch's dense operation of
   the same dtype, both in the maximum norm (`assert_matmul_close`, `assert_conv2d_close`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit._ops import conv2d_size
from sparsekit.pack import mask
from sparsekit.patterns import PatternLike, parse_pattern
from sparsekit.workload import activate

# With fewer results than this, the dense error is measured on more rows: the largest of a handful
# of errors is a matter of luck.
_RESULTS = 1 << 12


@dataclass(frozen=True)
class Problem:
    """One matmul with everything an epilogue can take.

    Attributes:
        x: `[m, k]`.
        weight: `[n, k]`, dense, zero where the mask is False.
        mask: bool `[n, k]`.
        bias: `[n]`.
        residual: `[m, n]`.
    """

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    residual: Tensor


def make_problem(
    m: int,
    n: int,
    k: int,
    pattern: PatternLike,
    dtype: torch.dtype = torch.float32,
    integers: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A random problem whose weight follows a pattern.

    Args:
        m: rows of x.
        n: out_features.
        k: in_features.
        pattern: of the weight.
        dtype: of every tensor.
        integers: whole numbers from -3 to 3 instead of normal ones; no kept weight is zero.
        seed: of the generator.
        device: of every tensor; the numbers are the same on each.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)
        return torch.randn(*shape, generator=generator).to(device, dtype)

    mask = parse_pattern(pattern).mask(torch.rand(n, k, generator=generator)).to(device)
    weight = draw(n, k)
    weight = torch.where(weight == 0, torch.ones_like(weight), weight)
    weight = torch.where(mask, weight, torch.zeros_like(weight))
    return Problem(draw(m, k), weight, mask, draw(n), draw(m, n))


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias) + residual` in float64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    y = activate(y, activation)
    return y if residual is None else y + residual.double()


def dense_result(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same with torch's dense operations in the tensors' own dtype."""
    y = activate(functional.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def assert_matmul_exact(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Integer inputs: the result is the reference, rounded once to y's dtype.

    Raises:
        AssertionError: with the first place that differs.
    """
    _assert_exact(y, reference(x, weight, bias, activation, residual))


def _assert_exact(y: Tensor, reference: Tensor) -> None:
    expected = reference.to(y.dtype)
    assert y.shape == expected.shape, f"shape {list(y.shape)}, expected {list(expected.shape)}"
    wrong = ~(y == expected)
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {y.numel()} results differ, first at {first}: "
            f"{y[first].item()}, expected {expected[first].item()}"
        )


def assert_matmul_close(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Random inputs: the error against float64 is at most twice that of torch's dense operation.

    Errors are compared in the maximum norm. A half unit in the last place of the largest result is
    always allowed: no result of the dtype can promise less. For small problems the dense error is
    the largest over more rows, made of x's own values in other orders.

    Raises:
        AssertionError: with both errors.
    """
    expected = reference(x, weight, bias, activation, residual)
    _assert_close(y, x, expected, lambda: _dense_error(x, weight, bias, activation, residual))


def _assert_close(y: Tensor, x: Tensor, expected: Tensor, dense_error: Callable[[], float]) -> None:
    assert y.shape == expected.shape, f"shape {list(y.shape)}, expected {list(expected.shape)}"
    assert y.dtype == x.dtype, f"dtype {y.dtype}, expected {x.dtype}"
    if y.numel() == 0:
        return
    assert bool(y.isfinite().all()), "the result holds a NaN or an infinity"
    error = (y.double() - expected).abs().max().item()
    floor = 0.5 * torch.finfo(y.dtype).eps * expected.abs().max().item()
    allowed = dense_error()
    if error > 2 * allowed + floor:
        raise AssertionError(
            f"the error against float64 is {error:.3g}, torch's dense operation has "
            f"{allowed:.3g} (twice that plus {floor:.3g} is allowed)"
        )


def _dense_error(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> float:
    rows, columns = x.reshape(-1, x.shape[-1]), weight.shape[0]
    rest = None if residual is None else residual.reshape(-1, columns)
    missing = -(-_RESULTS // columns) - rows.shape[0]
    if missing > 0:
        generator = torch.Generator().manual_seed(0)
        order = torch.randint(rows.numel(), (missing, rows.shape[1]), generator=generator)
        rows = torch.cat([rows, rows.reshape(-1)[order]])
        if rest is not None:
            order = torch.randint(rest.numel(), (missing, columns), generator=generator)
            rest = torch.cat([rest, rest.reshape(-1)[order]])
    expected = reference(rows, weight, bias, activation, rest)
    dense = dense_result(rows, weight, bias, activation, rest)
    return (dense.double() - expected).abs().max().item()


# --- convolutions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvProblem:
    """One 2-D convolution with everything an epilogue can take.

    Attributes:
        x: `[N, Cin, H, W]`, `channels_last`.
        weight: `[Cout, Cin / groups, height, width]`, zero where the mask is False.
        mask: bool, of the weight's shape.
        bias: `[Cout]`.
        residual: `[N, Cout, Hout, Wout]`, `channels_last`.
        stride: (height, width).
        padding: top, left, bottom, right.
        dilation: (height, width).
        groups: of the convolution.
    """

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    residual: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def make_conv_problem(
    size: tuple[int, int, int, int],
    out_channels: int,
    kernel_size: tuple[int, int],
    pattern: PatternLike,
    dtype: torch.dtype = torch.float32,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    integers: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ConvProblem:
    """A random convolution whose filters follow a pattern.

    Args:
        size: of x: (N, Cin, H, W).
        out_channels: Cout.
        kernel_size: (height, width).
        pattern: of the filters.
        dtype: of every tensor.
        stride: (height, width).
        padding: top, left, bottom, right.
        dilation: (height, width).
        groups: of the convolution.
        integers: whole numbers from -3 to 3 instead of normal ones; no kept weight is zero.
        seed: of the generator.
        device: of every tensor; the numbers are the same on each.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            drawn = torch.randint(-3, 4, shape, generator=generator).to(device, dtype)
        else:
            drawn = torch.randn(*shape, generator=generator).to(device, dtype)
        four = len(shape) == 4
        return drawn.contiguous(memory_format=torch.channels_last) if four else drawn

    shape = (out_channels, size[1] // groups, *kernel_size)
    kept = mask(torch.rand(shape, generator=generator), pattern).to(device)
    weight = draw(*shape).contiguous()
    weight = torch.where(weight == 0, torch.ones_like(weight), weight)
    weight = torch.where(kept, weight, torch.zeros_like(weight))
    pixels = conv2d_size(size[2:], kernel_size, stride, padding, dilation)
    residual = draw(size[0], out_channels, *pixels)
    return ConvProblem(
        draw(*size), weight, kept, draw(out_channels), residual, stride, padding, dilation, groups
    )


def conv2d_result(
    problem: ConvProblem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`activation(conv2d(x) + bias) + residual` with torch's dense operations in a dtype."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    top, left, bottom, right = problem.padding
    y = functional.conv2d(
        functional.pad(problem.x.to(dtype), (left, right, top, bottom)),
        problem.weight.to(dtype),
        cast(bias),
        problem.stride,
        0,
        problem.dilation,
        problem.groups,
    )
    added = cast(residual)
    if added is None:
        return activate(y, activation)
    return activate(y + added, activation) if residual_first else activate(y, activation) + added


def assert_conv2d_exact(
    y: Tensor,
    problem: ConvProblem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
) -> None:
    """As `assert_matmul_exact`, for the result of a convolution."""
    _assert_exact(y, conv2d_result(problem, bias, activation, residual, residual_first))


def assert_conv2d_close(
    y: Tensor,
    problem: ConvProblem,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
) -> None:
    """As `assert_matmul_close`, for the result of a convolution."""

    def dense_error() -> float:
        return _conv2d_error(problem, bias, activation, residual, residual_first)

    expected = conv2d_result(problem, bias, activation, residual, residual_first)
    _assert_close(y, problem.x, expected, dense_error)


def _conv2d_error(
    problem: ConvProblem,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    residual_first: bool,
) -> float:
    """Of torch's dense operation; where there are few results, on more images of x's values."""
    results = problem.residual.numel()
    more = -(-_RESULTS // results) - 1
    x, added = problem.x, residual
    if more > 0:
        generator = torch.Generator().manual_seed(0)

        def shuffled(tensor: Tensor) -> Tensor:
            shape = (more * tensor.shape[0], *tensor.shape[1:])
            order = torch.randint(tensor.numel(), shape, generator=generator)
            return torch.cat([tensor, tensor.flatten()[order]])

        x = shuffled(x)
        added = None if added is None else shuffled(added)
    larger = replace(problem, x=x)
    arguments = (bias, activation, added, residual_first)
    expected = conv2d_result(larger, *arguments)
    dense = conv2d_result(larger, *arguments, dtype=problem.x.dtype)
    return (dense.double() - expected).abs().max().item()
