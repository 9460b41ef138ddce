"""`sk.linear`: shapes, strides, dtypes, autocast, and every refusal."""

from __future__ import annotations

import pytest
import torch

import sparsekit as sk
from sparsekit.testing import (
    assert_matmul_close,
    assert_matmul_exact,
    make_problem,
    reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("lead", [(), (1,), (7,), (0,), (2, 3), (2, 0, 3), (1, 2, 3, 4)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    problem = make_problem(24, 33, 70, "2:4", integers=True)
    packed = sk.pack(problem.weight, "2:4")
    m = torch.Size(lead).numel()
    x = problem.x[:m].reshape(*lead, 70)
    residual = problem.residual[:m].reshape(*lead, 33)
    y = sk.linear(x, packed, problem.bias, "relu", residual)
    assert y.shape == (*lead, 33)
    assert y.is_contiguous()
    assert_matmul_exact(y, x, problem.weight, problem.bias, "relu", residual)


def test_any_strides() -> None:
    problem = make_problem(12, 33, 70, "2:4", integers=True)
    packed = sk.pack(problem.weight, "2:4")
    wide = torch.zeros(12, 140)
    wide[:, ::2] = problem.x
    views = {
        "transposed": problem.x.t().contiguous().t(),
        "every other column": wide[:, ::2],
        "every other row": problem.x.repeat_interleave(2, 0)[::2],
        "reversed": problem.x.flip(0),
        "permuted": problem.x.view(3, 4, 70).permute(1, 0, 2),
        "expanded": problem.x[:1].expand(12, 70),
        "windows": problem.x.flatten().unfold(0, 70, 3),
    }
    for name, x in views.items():
        y = sk.linear(x, packed)
        assert torch.equal(y, reference(x, problem.weight).float()), name
    column = torch.zeros(33, 2)
    column[:, 0] = problem.bias
    residual = problem.residual.t().contiguous().t()
    y = sk.linear(problem.x, packed, column[:, 0], None, residual)
    assert_matmul_exact(y, problem.x, problem.weight, problem.bias, None, problem.residual)


def test_one_input_feature_of_any_stride() -> None:
    packed = sk.pack(torch.tensor([[2.0], [3.0]]), "2:4")
    x = torch.arange(10.0).view(5, 2)[:, 1:]
    assert torch.equal(sk.linear(x, packed), x * torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.75"])
def test_random_data_is_as_close_as_dense(
    pattern: str, dtype: torch.dtype, activation: str | None
) -> None:
    problem = make_problem(30, 65, 203, pattern, dtype)
    packed = sk.pack(problem.weight, pattern)
    arguments = (problem.bias, activation, problem.residual)
    y = sk.linear(problem.x.view(5, 6, 203), packed, problem.bias, activation)
    assert_matmul_close(y, problem.x.view(5, 6, 203), problem.weight, problem.bias, activation)
    y = sk.linear(problem.x, packed, *arguments)
    assert_matmul_close(y, problem.x, problem.weight, *arguments)


def test_inputs_are_not_changed() -> None:
    problem = make_problem(5, 16, 32, "2:4")
    packed = sk.pack(problem.weight, "2:4")
    before = [t.clone() for t in (problem.x, problem.bias, problem.residual, packed.data)]
    sk.linear(problem.x, packed, problem.bias, "gelu", problem.residual)
    after = (problem.x, problem.bias, problem.residual, packed.data)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_takes_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    problem = make_problem(5, 16, 32, "2:4", torch.float32, integers=True)
    packed = sk.pack(problem.weight, "2:4", dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sk.linear(problem.x.half(), packed, problem.bias, None, problem.residual.bfloat16())
    assert y.dtype == dtype
    assert torch.equal(
        y, reference(problem.x, problem.weight, problem.bias, None, problem.residual).to(dtype)
    )


def packed_and_x() -> tuple[sk.PackedWeight, torch.Tensor]:
    return sk.pack(make_problem(1, 48, 1024, "2:4").weight, "2:4"), torch.zeros(3, 1024)


def test_wrong_x_is_refused() -> None:
    packed, x = packed_and_x()
    cases = [
        (
            torch.zeros(3, 1000),
            r"x has k=1000, the packed weight has k=1024; pad x to 1024 columns or repack\.",
        ),
        (
            torch.zeros(3, 1030),
            r"x has k=1030, the packed weight has k=1024; pass x\[\.\.\., :1024\] or repack\.",
        ),
        (torch.zeros(()), r"x is a scalar, expected \[\.\.\., k\] with k=1024"),
        (x.bfloat16(), r"x is torch\.bfloat16, the packed weight is torch\.float32; convert x"),
        (x.double(), r"x is torch\.float64"),
        (x.long(), r"x is torch\.int64"),
        (x.to("meta"), r"x is on meta, the packed weight on cpu"),
    ]
    for wrong, says in cases:
        with pytest.raises(ValueError, match=says):
            sk.linear(wrong, packed)


def test_wrong_bias_residual_and_activation_are_refused() -> None:
    packed, x = packed_and_x()
    for bias, says in [
        (torch.zeros(47), r"bias has shape \[47\], the packed weight has n=48; expected \[48\]"),
        (torch.zeros(1, 48), r"bias has shape \[1, 48\]"),
        (torch.zeros(48).half(), r"bias is torch\.float16"),
        (torch.zeros(48, device="meta"), r"bias is on meta"),
    ]:
        with pytest.raises(ValueError, match=says):
            sk.linear(x, packed, bias)
    for residual, says in [
        (torch.zeros(48), r"residual has shape \[48\], the result has \[3, 48\]"),
        (torch.zeros(1, 48), r"residual has shape \[1, 48\]"),
        (torch.zeros(3, 47), r"residual has shape \[3, 47\]"),
        (torch.zeros(()), r"residual has shape \[\]"),
        (torch.zeros(3, 48).bfloat16(), r"residual is torch\.bfloat16"),
        (torch.zeros(3, 48, device="meta"), r"residual is on meta"),
    ]:
        with pytest.raises(ValueError, match=says):
            sk.linear(x, packed, residual=residual)
    with pytest.raises(ValueError, match="unknown activation 'tanh'; expected one of"):
        sk.linear(x, packed, activation="tanh")


def test_a_dense_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a PackedWeight, got Tensor; make one with"):
        sk.linear(torch.zeros(1, 4), torch.eye(4))  # type: ignore[arg-type]


def test_a_weight_on_another_device_is_refused() -> None:
    packed, x = packed_and_x()
    with pytest.raises(ValueError, match="x is on cpu, the packed weight on meta"):
        sk.linear(x, packed.to("meta"))
