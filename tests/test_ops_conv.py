"""The operator `sparsekit::conv2d`: schema, fake tensors, gradients, alignment for GPUs."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekit as sk
from sparsekit import _native, _ops
from sparsekit.testing import ConvProblem, conv2d_result, make_conv_problem

LAST = torch.channels_last
# kernel, stride, padding (top, left, bottom, right), dilation, groups
GEOMETRIES: tuple[tuple[Any, ...], ...] = (
    ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 2),
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 4),
    ((2, 3), (1, 2), (0, 1, 1, 2), (2, 1), 2),
    ((3, 2), (3, 1), (2, 0, 0, 5), (1, 1), 1),
)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def problem_of(geometry: tuple[Any, ...] = GEOMETRIES[2], **options: Any) -> ConvProblem:
    kernel, stride, padding, dilation, groups = geometry
    arguments: dict[str, Any] = {"pattern": "2:4", **options}
    return make_conv_problem(
        (2, 16, 6, 7),
        32,
        kernel,
        arguments.pop("pattern"),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        **arguments,
    )


def arguments_of(problem: ConvProblem, pattern: str = "2:4") -> tuple[Any, ...]:
    """What the operator takes after x."""
    packed = sk.pack(problem.weight, pattern, groups=problem.groups)
    filters = packed.meta.filters
    assert filters is not None
    return (
        packed.data,
        filters.out_channels,
        list(filters.kernel_size),
        list(problem.stride),
        list(problem.padding),
        list(problem.dilation),
        problem.groups,
        filters.tap(packed.pattern),
    )


def run(problem: ConvProblem, x: Tensor, *epilogue: Any, pattern: str = "2:4") -> Tensor:
    return _ops.conv2d_direct(x, *arguments_of(problem, pattern), *epilogue)


@pytest.mark.parametrize(("activation", "first"), [(None, False), ("relu", True)])
@pytest.mark.parametrize("geometry", GEOMETRIES[3:5])
def test_opcheck(geometry: tuple[Any, ...], activation: str | None, first: bool) -> None:
    problem = problem_of(geometry)
    rest = (leaf(problem.bias), activation, leaf(problem.residual), first)
    for x in (leaf(problem.x), leaf(problem.x.contiguous())):
        opcheck(_ops.conv2d, (x, *arguments_of(problem), *rest))
    opcheck(_ops.conv2d, (problem.x, *arguments_of(problem), None, activation))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", _ops.ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_are_those_of_the_dense_layer(
    geometry: tuple[Any, ...], activation: str | None, first: bool
) -> None:
    for pattern in ("2:4", "bsr4x4@0.5"):
        problem = problem_of(geometry, pattern=pattern)
        ours = [leaf(t) for t in (problem.x, problem.bias, problem.residual)]
        theirs = [leaf(t.double()) for t in (problem.x, problem.bias, problem.residual)]
        upstream = torch.randn(problem.residual.shape, generator=torch.Generator().manual_seed(1))
        x, bias, residual = ours
        run(problem, x, bias, activation, residual, first, pattern=pattern).backward(upstream)
        x64, bias64, residual64 = theirs
        dense = ConvProblem(**{**vars(problem), "x": x64})
        conv2d_result(dense, bias64, activation, residual64, first).backward(upstream.double())
        for mine, right in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_only_what_needs_a_gradient_gets_one(
    needs: tuple[bool, bool, bool], activation: str | None, first: bool
) -> None:
    problem = problem_of()
    inputs = [
        leaf(tensor) if need else tensor
        for tensor, need in zip((problem.x, problem.bias, problem.residual), needs, strict=True)
    ]
    x, bias, residual = inputs
    y = run(problem, x, bias, activation, residual, first)
    assert y.requires_grad
    y.sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == list(needs)


def test_second_derivatives() -> None:
    problem = problem_of(GEOMETRIES[4])
    x, x64 = leaf(problem.x), leaf(problem.x.double())
    grads = []
    for arg, y in (
        (x, run(problem, x, None, "gelu")),
        (x64, conv2d_result(ConvProblem(**{**vars(problem), "x": x64}), None, "gelu")),
    ):
        (first,) = torch.autograd.grad(y.pow(2).sum(), arg, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), arg)
        grads.append(second.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    problem = problem_of(dtype=dtype)
    x, bias = leaf(problem.x), leaf(problem.bias)
    run(problem, x, bias, "silu").sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.dtype == bias.grad.dtype == dtype


def test_the_result_may_be_changed_in_place() -> None:
    """As an `nn.ReLU(inplace=True)` behind the layer does."""
    problem = problem_of(integers=True)
    x = leaf(problem.x)
    y = run(problem, x)
    y.relu_()
    y.sum().backward()
    assert torch.equal(y.double(), conv2d_result(problem, None, "relu"))
    x64 = leaf(problem.x.double())
    conv2d_result(ConvProblem(**{**vars(problem), "x": x64}), None, "relu").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.double(), x64.grad)


def test_the_kernel_can_be_named() -> None:
    problem = problem_of(integers=True)
    packed = sk.pack(problem.weight, "2:4", target="reference").data
    arguments = (packed, *arguments_of(problem)[1:], None, None, None, False)
    y = _ops.conv2d(problem.x, *arguments, "conv2d_nm_f32_scalar")
    assert torch.equal(y.double(), conv2d_result(problem))
    for name in ("no_such_kernel", "matmul_nm_f32_scalar"):
        with pytest.raises((ValueError, NotImplementedError), match=name):
            _ops.conv2d(problem.x, *arguments, name)


def test_bytes_that_are_no_packed_weight_are_refused() -> None:
    problem = problem_of()
    data, *rest = arguments_of(problem)
    for bad in (torch.zeros(4096, dtype=torch.uint8), data[:0], data[:-1].clone()):
        with pytest.raises(ValueError, match=r"."):
            _ops.conv2d(problem.x, bad, *rest)
    for position, value in ((0, 33), (1, [3, 2]), (6, 24)):
        wrong = list(rest)
        wrong[position] = value
        with pytest.raises(ValueError, match=r"the packed weight has [nk]="):
            _ops.conv2d(problem.x, data, *wrong)
    with pytest.raises(ValueError, match="which is not 3x3 taps of 20 channels or more; repack"):
        _ops.conv2d(torch.zeros(1, 20, 5, 5), data, *rest)


# --- without the dispatcher where nobody looks, through it where somebody does ---


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes the calls that do not go through the dispatcher."""
    calls: list[str] = []
    right = _ops._conv2d

    def spy(*args: Any) -> Tensor:
        calls.append("direct")
        return right(*args)

    monkeypatch.setattr(_ops, "_conv2d", spy)
    return calls


class Mode(TorchDispatchMode):
    """Lists the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_calls_do_not_go_through_the_dispatcher(direct: list[str]) -> None:
    problem = problem_of(integers=True)
    packed = sk.pack(problem.weight, "2:4")
    expected = conv2d_result(problem, problem.bias, "relu", problem.residual, True).float()
    for index, context in enumerate((torch.no_grad(), torch.inference_mode(), torch.enable_grad())):
        with context:
            y = sk.conv2d(
                problem.x,
                packed,
                problem.bias,
                padding=1,
                activation="relu",
                residual=problem.residual,
                residual_first=True,
            )
        assert torch.equal(y, expected)
        assert len(direct) == index + 1
    sk.conv2d(leaf(problem.x), packed)
    with Mode() as mode:
        sk.conv2d(problem.x, packed)
    assert "sparsekit.conv2d.default" in mode.seen
    assert len(direct) == 3


def test_fake_tensors_and_tracers_see_the_operator(direct: list[str]) -> None:
    problem = problem_of(integers=True)
    packed = sk.pack(problem.weight, "2:4")
    with FakeTensorMode() as mode:
        data = mode.from_tensor(packed.data)
        y = sk.conv2d(mode.from_tensor(problem.x), sk.PackedWeight(data, packed.meta), stride=2)
        assert isinstance(y, FakeTensor)
        assert y.shape == (2, 32, 2, 3)
        assert y.is_contiguous(memory_format=LAST)
    graph = make_fx(lambda x, data: sk.conv2d(x, sk.PackedWeight(data, packed.meta)))(
        problem.x, packed.data
    )
    assert "sparsekit.conv2d" in graph.code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the checks look at the shape
        traced = torch.jit.trace(lambda x: sk.conv2d(x, packed), (problem.x,), check_trace=False)
    assert "sparsekit::conv2d" in str(traced.graph)
    assert sk.conv2d(problem.x.to("meta"), packed.to("meta")).device.type == "meta"
    y = torch.vmap(lambda x: sk.conv2d(x, packed, padding=1))(problem.x)
    assert torch.equal(y.double(), conv2d_result(problem))
    assert direct == []


# --- what a GPU wants -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_on_multiples_of_16_bytes(dtype: torch.dtype) -> None:
    unit = 16 // dtype.itemsize

    def images(channels: int, offset: int, batch: int = 2, height: int = 3) -> Tensor:
        shape = (batch, height, 3, channels)
        numbers = torch.arange(offset + torch.Size(shape).numel()).to(dtype)[offset:]
        return numbers.view(shape).permute(0, 3, 1, 2)

    for x, same in (
        (images(2 * unit, 0), True),
        (images(2 * unit, unit), True),
        (images(2 * unit, 1), False),
        (images(unit + 1, 0), False),
        (images(2 * unit, 0)[:, unit:], True),
        (images(2 * unit, 0)[:, 1:], False),
        (images(3 * unit, 0)[:, :1], True),
        (images(1, 0), False),
        # The only image, line and pixel has no next one.
        (images(unit + 1, 0, 1, 1)[:, :, :, :1], True),
        (images(unit + 1, unit, 1, 2)[:, :, :, :1], False),
    ):
        aligned = _ops._aligned_pixels(x)
        assert (aligned is x) == same
        assert torch.equal(aligned, x)
        assert aligned.data_ptr() % 16 == 0
        assert aligned.stride(1) == 1
        for size, stride in zip(x.shape, aligned.stride(), strict=True):
            assert size == x.shape[1] or size == 1 or stride * dtype.itemsize % 16 == 0


def test_each_group_gets_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that a GPU would get, made on a CPU."""
    problem = problem_of(GEOMETRIES[3], dtype=torch.float16)
    packed = sk.pack(problem.weight, "2:4", groups=4)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_native, "conv2d", lambda *args: calls.append(args))
    monkeypatch.setattr(
        _ops,
        "_gpu_call",
        lambda header, device: _native.GpuCall(header, 7, torch.zeros(1)),
    )
    x = problem.x.contiguous(memory_format=LAST)
    # Only the question whether x is on a GPU is answered otherwise.
    monkeypatch.setattr(Tensor, "is_cuda", True)
    _ops._conv2d(
        x,
        *arguments_of(problem),
        problem.bias,
        header=packed.meta.header,
    )
    assert len(calls) == 4
    for group, (part, k, shape, data, y, bias, *_, gpu) in enumerate(calls):
        assert torch.equal(part, x[:, 4 * group : 4 * group + 4])
        assert part.data_ptr() % 16 == 0
        assert (k, shape.kernel_size, shape.out_size) == (9 * 8, (3, 3), (3, 4))
        assert torch.equal(data, packed.data.view(4, -1)[group])
        assert y.shape == (2, 8, 3, 4)
        assert (y.storage_offset(), y.stride(3)) == (8 * group, 32)
        assert torch.equal(bias, problem.bias[8 * group : 8 * group + 8])
        assert gpu.header == _native.packed_header(data)
    with pytest.raises(ValueError, match=r"conv2d: a packed weight on a GPU needs its header"):
        _ops._conv2d(x, *arguments_of(problem))
