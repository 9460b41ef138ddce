"""The torch operators: schema, fake tensors, gradients, overhead-free shapes."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekit as sk
from sparsekit import _ops
from sparsekit.testing import Problem, make_problem, reference

ACTIVATIONS = _ops.ACTIVATIONS


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["2:4", "bsr16x16@0.5"])
def test_opcheck_linear(pattern: str, activation: str | None) -> None:
    problem = make_problem(5, 33, 70, pattern)
    packed = sk.pack(problem.weight, pattern).data
    opcheck(
        _ops.linear,
        (leaf(problem.x), packed, 33, leaf(problem.bias), activation, leaf(problem.residual)),
    )
    opcheck(_ops.linear, (problem.x.view(5, 1, 70), packed, 33, None, activation))


def test_opcheck_to_dense() -> None:
    packed = sk.pack(torch.eye(16), "2:4").data
    opcheck(torch.ops.sparsekit.to_dense.default, (packed, 16, 16, torch.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "bsr16x16@0.5"])
def test_gradients_are_those_of_the_dense_layer(pattern: str, activation: str | None) -> None:
    problem = make_problem(6, 33, 70, pattern)
    packed = sk.pack(problem.weight, pattern)
    ours = [leaf(t) for t in (problem.x, problem.bias, problem.residual)]
    theirs = [leaf(t.double()) for t in (problem.x, problem.bias, problem.residual)]
    upstream = torch.randn(6, 33, generator=torch.Generator().manual_seed(1))
    x, bias, residual = ours
    sk.linear(x, packed, bias, activation, residual).backward(upstream)
    x64, bias64, residual64 = theirs
    reference(x64, problem.weight, bias64, activation, residual64).backward(upstream.double())
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_only_what_needs_a_gradient_gets_one(needs: tuple[bool, bool, bool]) -> None:
    problem = make_problem(4, 16, 32, "2:4")
    packed = sk.pack(problem.weight, "2:4")
    inputs = [
        leaf(tensor) if need else tensor
        for tensor, need in zip((problem.x, problem.bias, problem.residual), needs, strict=True)
    ]
    x, bias, residual = inputs
    y = sk.linear(x, packed, bias, "gelu", residual)
    assert y.requires_grad
    y.sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == list(needs)


def test_second_derivatives() -> None:
    problem = make_problem(3, 16, 32, "2:4")
    packed = sk.pack(problem.weight, "2:4")
    x, x64 = leaf(problem.x), leaf(problem.x.double())
    grads = []
    for arg, y in (
        (x, sk.linear(x, packed, None, "gelu")),
        (x64, reference(x64, problem.weight, None, "gelu")),
    ):
        (first,) = torch.autograd.grad(y.pow(2).sum(), arg, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), arg)
        grads.append(second.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    problem = make_problem(4, 16, 32, "2:4", dtype)
    x, bias = leaf(problem.x), leaf(problem.bias)
    sk.linear(x, sk.pack(problem.weight, "2:4"), bias, "silu").sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.dtype == bias.grad.dtype == dtype


def test_the_kernel_can_be_named() -> None:
    problem = make_problem(4, 16, 32, "2:4", integers=True)
    packed = sk.pack(problem.weight, "2:4", target="reference").data
    y = _ops.linear(problem.x, packed, 16, None, None, None, "matmul_nm_f32_scalar")
    assert torch.equal(y, reference(problem.x, problem.weight).float())
    with pytest.raises((ValueError, NotImplementedError), match="no_such_kernel"):
        _ops.linear(problem.x, packed, 16, None, None, None, "no_such_kernel")


def test_bytes_that_are_no_packed_weight_are_refused() -> None:
    x = torch.zeros(2, 32)
    for data in (torch.zeros(4096, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"."):
            _ops.linear(x, data, 16)
    packed = sk.pack(torch.eye(32), "2:4").data
    with pytest.raises(ValueError, match=r"."):
        _ops.linear(x, packed[:-1].clone(), 32)
    with pytest.raises(ValueError, match=r"."):
        _ops.linear(x, packed, 33)
    with pytest.raises(ValueError, match=r"."):
        _ops.linear(x[:, :31].contiguous(), packed, 32)


# --- without the dispatcher where nobody looks, through it where somebody does ---


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes the calls that do not go through the dispatcher."""
    calls: list[str] = []
    run = _ops._linear_cpu

    def spy(*args: Any) -> Tensor:
        calls.append("direct")
        return run(*args)

    monkeypatch.setattr(_ops, "_linear_cpu", spy)
    return calls


class Mode(TorchDispatchMode):
    """Lists the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """The same for functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that wants to see every function."""


def _layer() -> tuple[Problem, sk.PackedWeight]:
    problem = make_problem(4, 16, 32, "2:4", integers=True)
    return problem, sk.pack(problem.weight, "2:4")


def test_plain_calls_do_not_go_through_the_dispatcher(direct: list[str]) -> None:
    problem, packed = _layer()
    x, bias, residual = problem.x, problem.bias, problem.residual
    expected = reference(x, problem.weight, bias, "relu", residual).float()
    parameter = torch.nn.Parameter(bias, requires_grad=False)
    calls = 0
    for context in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
        with context:
            for b in (bias, parameter):
                y = sk.linear(x, packed, b, "relu", residual)
                calls += 1
                assert torch.equal(y, expected)
                assert not y.requires_grad
                assert y.is_inference() == torch.is_inference_mode_enabled()
    with torch.no_grad():  # what would need a gradient needs none here
        sk.linear(leaf(x), packed, leaf(bias))
    assert len(direct) == calls + 1


def test_gradients_go_through_the_dispatcher(direct: list[str]) -> None:
    problem, packed = _layer()
    for x, bias, residual in (
        (leaf(problem.x), problem.bias, None),
        (problem.x, leaf(problem.bias), None),
        (problem.x, None, leaf(problem.residual)),
    ):
        assert sk.linear(x, packed, bias, None, residual).requires_grad
    assert direct == []


def test_modes_and_subclasses_see_the_operator(direct: list[str]) -> None:
    problem, packed = _layer()
    for mode in (Mode(), FunctionMode()):
        with mode:
            y = sk.linear(problem.x, packed)
        assert "sparsekit.linear.default" in mode.seen
        assert torch.equal(y, reference(problem.x, problem.weight).float())
    y = sk.linear(problem.x.as_subclass(Subclass), packed)
    assert type(y) is Subclass
    with torch.autocast("cpu", torch.bfloat16):
        sk.linear(problem.x, packed.to(torch.bfloat16))
    assert direct == []


def test_fake_tensors_and_tracers_see_the_operator(direct: list[str]) -> None:
    problem, packed = _layer()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(problem.x)
        data = mode.from_tensor(packed.data)
        y = sk.linear(fake, sk.PackedWeight(data, packed.meta))
        assert isinstance(y, FakeTensor)
        assert y.shape == (4, 16)
    for arguments in ({}, {"tracing_mode": "fake", "pre_dispatch": True}):
        graph = make_fx(
            lambda x, data: sk.linear(x, sk.PackedWeight(data, packed.meta)), **arguments
        )(problem.x, packed.data)
        assert "sparsekit.linear" in graph.code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the checks look at the shape
        traced = torch.jit.trace(lambda x: sk.linear(x, packed), (problem.x,), check_trace=False)
    assert "sparsekit::linear" in str(traced.graph)
    meta = sk.linear(problem.x.to("meta"), packed.to("meta"))
    assert meta.device.type == "meta"
    assert direct == []


def test_compilers_see_the_operator(direct: list[str]) -> None:
    problem, packed = _layer()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda x: sk.linear(x, packed), backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(problem.x)
        program = torch.export.export(sk.nn.SparseLinear(packed), (problem.x,))
    assert "sparsekit.linear" in seen[0]
    assert "sparsekit.linear" in str(program.graph)
    assert direct == []


def test_functorch_and_the_profiler_see_the_operator(direct: list[str]) -> None:
    problem, packed = _layer()
    expected = reference(problem.x, problem.weight).float()
    y = torch.vmap(lambda x: sk.linear(x, packed))(problem.x.view(2, 2, 32))
    assert torch.equal(y.view(4, 16), expected)
    # torch refuses it for such operators; a direct call would have answered with zeros.
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: sk.linear(x, packed).sum())(problem.x)
    with torch.profiler.profile() as profile:
        sk.linear(problem.x, packed)
    assert "sparsekit::linear" in {event.key for event in profile.key_averages()}
    assert direct == []


def test_a_negative_view_is_no_plain_tensor(direct: list[str]) -> None:
    """Its memory holds the opposite of its values."""
    problem, packed = _layer()
    x = torch.complex(torch.zeros_like(problem.x), -problem.x).conj().imag
    assert x.is_neg()
    y = sk.linear(x, packed)
    assert torch.equal(y, reference(problem.x, problem.weight).float())
    assert direct == []
