"""`sk.conv2d` and `sk.conv1d`: shapes, memory formats, dtypes, and every refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import sparsekit as sk
from sparsekit import _native, _ops
from sparsekit.testing import (
    ConvProblem,
    assert_conv2d_close,
    assert_conv2d_exact,
    make_conv_problem,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last


def problem_of(**options: Any) -> ConvProblem:
    arguments: dict[str, Any] = {
        "size": (2, 16, 6, 7),
        "out_channels": 33,
        "kernel_size": (3, 3),
        "pattern": "2:4",
        "integers": True,
        **options,
    }
    return make_conv_problem(**arguments)


def pack(problem: ConvProblem, pattern: str = "2:4") -> sk.PackedWeight:
    return sk.pack(problem.weight, pattern, groups=problem.groups)


# --- what is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.75"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (2, 5)])
def test_arguments_mean_what_they_mean_in_torch(
    pattern: str, groups: int, kernel_size: tuple[int, int]
) -> None:
    for stride, padding, dilation in (
        (1, 0, 1),
        (2, 1, 1),
        ((1, 2), (2, 0), 1),
        (1, "valid", 2),
        ([2, 1], [0, 3], [1, 2]),
        (torch.Size([3]), (1,), 1),
    ):
        problem = problem_of(
            size=(2, 32, 9, 11),
            out_channels=64,
            kernel_size=kernel_size,
            groups=groups,
            pattern=pattern,
        )
        packed = pack(problem, pattern)
        y = sk.conv2d(problem.x, packed, problem.bias, stride, padding, dilation, groups, "relu")
        expected = functional.conv2d(
            problem.x.double(),
            problem.weight.double(),
            problem.bias.double(),
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
        ).relu()
        assert y.shape == expected.shape
        assert y.is_contiguous(memory_format=LAST)
        assert torch.equal(y.double(), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel_size", [(1, 1), (2, 3), (4, 4), (3, 6)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_same_is_that_of_torch(kernel_size: tuple[int, int], dilation: Any) -> None:
    problem = problem_of(kernel_size=kernel_size)
    y = sk.conv2d(problem.x, pack(problem), padding="same", dilation=dilation)
    expected = functional.conv2d(problem.x, problem.weight, None, 1, "same", dilation)
    assert y.shape[2:] == problem.x.shape[2:]
    assert torch.equal(y, expected)


def formats_of(x: Tensor) -> dict[str, Tensor]:
    """The same images in other memory."""
    wide = torch.full((x.shape[0], *x.shape[2:], 2 * x.shape[1] + 3), torch.nan)
    wide[..., 3 : 3 + x.shape[1]] = x.permute(0, 2, 3, 1)
    crop = functional.pad(x, (2, 1, 1, 3), value=torch.nan).contiguous(memory_format=LAST)
    return {
        "channels_last": x.contiguous(memory_format=LAST),
        "NCHW": x.contiguous(),
        "a slice of channels": wide.permute(0, 3, 1, 2)[:, 3 : 3 + x.shape[1]],
        "a crop": crop[:, :, 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]],
        "a crop of NCHW": crop.contiguous()[:, :, 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]],
        "every other image": x.repeat_interleave(2, 0).contiguous(memory_format=LAST)[::2],
        "lines and pixels exchanged": x.transpose(2, 3).contiguous(memory_format=LAST).mT,
        "batch inside": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("size", [(2, 16, 6, 7), (1, 5, 4, 4), (3, 1, 4, 5), (2, 8, 3, 3)])
def test_any_memory_format(size: tuple[int, int, int, int]) -> None:
    problem = problem_of(size=size, padding=(1,) * 4)
    packed = pack(problem)
    for name, x in formats_of(problem.x).items():
        assert torch.equal(x, problem.x), name
        y = sk.conv2d(x, packed, padding=1)
        assert y.is_contiguous(memory_format=LAST), name
        assert_conv2d_exact(y, problem)
    for name, residual in formats_of(problem.residual).items():
        y = sk.conv2d(problem.x, packed, problem.bias, 1, 1, residual=residual)
        assert y.is_contiguous(memory_format=LAST), name
        assert_conv2d_exact(y, problem, problem.bias, None, problem.residual)


@pytest.mark.parametrize("size", [(5, 16, 1, 1), (2, 16, 6, 1), (2, 16, 1, 6), (2, 16, 3, 4)])
def test_pixels_in_a_row_are_a_matrix(size: tuple[int, int, int, int]) -> None:
    """Whatever the strides of a dimension of size 1 are, a 1x1 convolution is run as a matmul."""
    problem = problem_of(size=size, kernel_size=(1, 1))
    packed = sk.pack(problem.weight, "2:4", target="reference")
    for x in (problem.x, problem.x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        y = _ops.conv2d(
            x if size[2:] != (1, 1) else x.contiguous(),
            packed.data,
            33,
            [1, 1],
            [1, 1],
            [0] * 4,
            [1, 1],
            1,
            16,
            kernel_id="matmul_nm_f32_scalar",
        )
        assert_conv2d_exact(y, problem)


def test_expanded_images() -> None:
    problem = problem_of(size=(1, 16, 1, 1), padding=(1,) * 4)
    for x in (problem.x.expand(3, 16, 1, 1), problem.x.expand(3, 16, 4, 5)):
        expanded = dataclasses.replace(problem, x=x)
        assert_conv2d_exact(sk.conv2d(x, pack(problem), padding=1), expanded)


def test_one_image_and_no_image() -> None:
    problem = problem_of(size=(1, 16, 6, 7))
    packed = pack(problem)
    y = sk.conv2d(problem.x[0], packed, residual=problem.residual[0])
    assert_conv2d_exact(y.unsqueeze(0), problem, None, None, problem.residual)
    assert sk.conv2d(problem.x[:0], packed, residual=problem.residual[:0]).shape == (0, 33, 4, 5)


@pytest.mark.parametrize("residual_first", [False, True])
@pytest.mark.parametrize("activation", _ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_data_is_as_close_as_dense(
    dtype: torch.dtype, activation: str | None, residual_first: bool
) -> None:
    for pattern in ("2:4", "bsr16x16@0.75"):
        problem = problem_of(
            size=(2, 32, 5, 6), padding=(1,) * 4, pattern=pattern, dtype=dtype, integers=False
        )
        epilogue = (problem.bias, activation, problem.residual, residual_first)
        y = sk.conv2d(
            problem.x,
            pack(problem, pattern),
            problem.bias,
            padding=1,
            activation=activation,
            residual=problem.residual,
            residual_first=residual_first,
        )
        assert y.dtype == dtype
        assert_conv2d_close(y, problem, *epilogue)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lead", [(), (1,), (3,), (0,)])
def test_conv1d(lead: tuple[int, ...], groups: int) -> None:
    problem = problem_of(size=(3, 16, 1, 19), kernel_size=(1, 5), out_channels=34, groups=groups)
    weight = problem.weight.squeeze(2)
    packed = sk.pack(weight, "2:4", groups=groups)
    x = problem.x[: lead[0], :, 0] if lead else problem.x[0, :, 0]
    for stride, padding, dilation in ((1, 0, 1), (2, 3, 2), ((3,), (1,), (1,)), (1, "same", 1)):
        expected = functional.conv1d(x, weight, problem.bias, stride, padding, dilation, groups)
        y = sk.conv1d(x, packed, problem.bias, stride, padding, dilation, groups, residual=expected)
        assert torch.equal(y, 2 * expected)
        if len(lead) and lead[0]:
            assert y.stride() == (y.shape[2] * 34, 1, 34)


def test_autocast_converts_to_the_dtype_of_the_weight() -> None:
    problem = problem_of(dtype=torch.bfloat16)
    packed = pack(problem)
    with torch.autocast("cpu", torch.bfloat16):
        y = sk.conv2d(problem.x.float(), packed, problem.bias.float(), residual=problem.residual)
    assert y.dtype == torch.bfloat16
    assert_conv2d_exact(y, problem, problem.bias, None, problem.residual)


def test_inputs_are_not_changed() -> None:
    problem = problem_of(integers=False)
    packed = pack(problem)
    tensors = (problem.x, problem.bias, problem.residual, packed.data)
    before = [tensor.clone() for tensor in tensors]
    sk.conv2d(problem.x, packed, problem.bias, activation="relu", residual=problem.residual).relu_()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# --- what is refused --------------------------------------------------------------------------

X = torch.zeros(2, 16, 6, 7)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": X[:, :15]}, r"x has 15 channels \(shape \[2, 15, 6, 7\]\), the packed weight takes 16"),
    ({"x": X[0, 0]}, r"x has shape \[6, 7\], expected \[N, 16, H, W\], or \[16, H, W\] for one"),
    ({"x": X[None]}, r"x has shape \[1, 2, 16, 6, 7\], expected"),
    ({"x": torch.zeros(6, 7, 16)}, r"x has 6 channels"),
    ({"x": X.half()}, r"x is torch\.float16, the packed weight is torch\.float32; convert x with"),
    ({"x": X.to("meta")}, "x is on meta, the packed weight on cpu; move one of them"),
    ({"x": X[:, :, :2]}, r"result would be 0x5 pixels: x has 2x7, the kernel is 3x3 with stride"),
    ({"x": X[:, :, :0]}, r"result would be -2x5 pixels: x has 0x7"),
    ({"x": X[:, :, :0], "padding": 9}, r"x has 0x7.* pass a larger x or more padding"),
    ({"dilation": 4}, r"result would be -2x-1 pixels"),
    ({"stride": 0}, "expected stride as one number or two of at least 1, got 0"),
    ({"stride": (1, -1)}, r"expected stride as one number or two of at least 1, got \(1, -1\)"),
    ({"stride": 1.5}, "expected stride as one number or two"),
    ({"stride": (1, 2, 3)}, "expected stride as one number or two"),
    ({"stride": True}, "expected stride as one number or two of at least 1, got True"),
    ({"stride": ()}, "expected stride as one number or two"),
    ({"stride": None}, "expected stride as one number or two of at least 1, got None"),
    ({"padding": -1}, "expected padding as one number or two of at least 0, got -1"),
    ({"padding": (0, -1)}, r"expected padding as one number or two of at least 0, got \(0, -1\)"),
    ({"padding": "full"}, "expected padding as numbers, 'same' or 'valid', got 'full'"),
    ({"padding": "same", "stride": 2}, "padding='same' takes a stride of 1, got 2"),
    ({"dilation": 0}, "expected dilation as one number or two of at least 1, got 0"),
    ({"groups": 2}, "groups=2, the weight is packed for groups=1; pass groups=1 or repack"),
    ({"bias": torch.zeros(16)}, r"bias has shape \[16\], the packed weight has n=33; expected"),
    ({"bias": torch.zeros(33).half()}, r"bias is torch\.float16"),
    ({"activation": "tanh"}, "unknown activation 'tanh'; expected one of"),
    (
        {"residual": torch.zeros(2, 33, 6, 7)},
        r"residual has .*, the result has \[2, 33, 4, 5\]",
    ),
    ({"residual": torch.zeros(33, 4, 5)}, r"residual has shape \[33, 4, 5\], the result has"),
    ({"residual": torch.zeros(2, 33, 4, 5).double()}, r"residual is torch\.float64"),
    ({"residual": torch.zeros(2, 33, 4, 5, device="meta")}, "residual is on meta"),
    # From the native code, whose offsets are of 32 bits.
    ({"dilation": 2**31, "kernel": (1, 1)}, r"dilation_height from 1 to 2\^31 - 1, got 2147483648"),
    ({"stride": 2**31}, r"expected stride_height from 1 to 2\^31 - 1, got 2147483648"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    arguments = dict(change)
    x, kernel = arguments.pop("x", X), arguments.pop("kernel", (3, 3))
    packed = sk.pack(torch.ones(33, 16, *kernel), "2:4")
    with pytest.raises(ValueError, match=f"^conv2d: .*{says}"):
        sk.conv2d(x, packed, **arguments)


def test_sizes_that_overflow_32_bits_are_refused() -> None:
    packed = sk.pack(torch.ones(1, 1, 1, 1), "2:4")
    shape = _native.Conv2dShape((1, 1), (1, 1), (0, 0), (1, 1), (1 << 16, 1 << 15))
    pixels = torch.zeros(1).expand(1 << 31, 1)
    with pytest.raises(ValueError, match=r"conv2d: expected m from 0 to 2\^31 - 1"):
        _native.conv2d(pixels.view(1, 1, 1 << 16, 1 << 15), 1, shape, packed.data, pixels)


def test_conv1d_refuses_in_its_own_name() -> None:
    packed = sk.pack(torch.ones(8, 4, 3), "2:4")
    for x, options, says in (
        (torch.zeros(4), {}, r"conv1d: x has shape \[4\], expected \[N, 4, L\], or \[4, L\]"),
        (torch.zeros(2, 2, 4, 9), {}, r"conv1d: x has shape \[2, 2, 4, 9\], expected"),
        (torch.zeros(3, 9), {}, "conv1d: x has 3 channels"),
        (torch.zeros(4, 2), {}, "conv1d: the result would be 1x0 pixels"),
        (torch.zeros(4, 9), {"stride": (1, 1)}, "expected stride as one number of at least 1"),
        (torch.zeros(4, 9), {"residual": torch.zeros(8, 9)}, r"the result has \[8, 7\]"),
    ):
        with pytest.raises(ValueError, match=says):
            sk.conv1d(x, packed, **options)  # type: ignore[arg-type]


def test_weights_of_another_operation_are_refused() -> None:
    matrix, one, two = (sk.pack(torch.ones(8, 4, *size), "2:4") for size in ((), (3,), (3, 3)))
    x = torch.zeros(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"conv2d: the packed weight is a matrix, \[8, 4\]; pack"):
        sk.conv2d(x, matrix)
    with pytest.raises(ValueError, match=r"conv2d: the packed weight is that of a conv1d"):
        sk.conv2d(x, one)
    with pytest.raises(ValueError, match=r"conv1d: the packed weight is that of a conv2d, \[8, 4,"):
        sk.conv1d(x, two)
    with pytest.raises(ValueError, match=r"linear: .* \[8, 4, 3, 3\]; use sparsekit\.conv2d or"):
        sk.linear(x, two)
    with pytest.raises(ValueError, match="conv2d: expected a PackedWeight, got Tensor; make one"):
        sk.conv2d(x, torch.ones(8, 4, 3, 3))  # type: ignore[arg-type]


def test_a_format_without_a_kernel_says_so() -> None:
    packed = sk.pack(torch.ones(8, 4, 3, 3), "2:4", target="cuda", dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"no kernel can run conv2d .*pack the weight"):
        sk.conv2d(torch.zeros(1, 4, 5, 5).half(), packed)
