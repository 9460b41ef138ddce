"""The torch operators: schema, fake tensors, gradients, overhead-free shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import sparsekit as sk
from sparsekit import _ops
from sparsekit.testing import make_problem, reference

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
