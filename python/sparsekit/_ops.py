"""The torch operators: `torch.ops.sparsekit.linear` and `torch.ops.sparsekit.to_dense`.

Both take packed bytes (uint8) and plain sizes, so that compiled and exported graphs carry them
without any Python object. Arguments are checked by `sparsekit.functional` and, before an address is
read, once more by the native code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekit import _native

ACTIVATIONS = tuple(_native.ACTIVATIONS)

_library = torch.library.Library("sparsekit", "DEF")
_library.define(
    "linear(Tensor x, Tensor packed, int n, Tensor? bias=None, str? activation=None, "
    "Tensor? residual=None, str? kernel_id=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "to_dense(Tensor packed, int n, int k, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear_cpu(
    x: Tensor,
    packed: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    kernel_id: str | None = None,
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], n))
    _native.matmul(
        _rows(x),
        packed,
        y if y.dim() == 2 else y.view(-1, n),
        bias if bias is None or bias.is_contiguous() else bias.contiguous(),
        activation,
        None if residual is None else _rows(residual),
        kernel_id,
    )
    return y


def _rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows do not overlap and whose last dimension is contiguous."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    stride, step = rows.stride()
    if step == 1 and (stride >= rows.shape[1] or rows.shape[0] <= 1):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    kernel_id: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _to_dense_cpu(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return _native.decompress(_native.unpack(packed))


def _to_dense_fake(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((n, k), dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, n, bias, activation, _, kernel_id = inputs
    ctx.n, ctx.k, ctx.dtype = n, x.shape[-1], x.dtype
    ctx.activation, ctx.kernel_id = activation, kernel_id
    # x is needed only to find the activation's argument again.
    ctx.save_for_backward(x if activation is not None else None, packed, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, bias = ctx.saved_tensors
    # Arguments left at their default at the end of the call are not listed.
    needs: tuple[bool, ...] = ctx.needs_input_grad
    need_x, _, _, need_bias, _, need_residual, *_ = needs + (False,) * 7
    grad_residual = grad if need_residual else None
    if (need_x or need_bias) and ctx.activation is not None:
        argument = torch.ops.sparsekit.linear(x, packed, ctx.n, bias, None, None, ctx.kernel_id)
        grad = _activation_backward(ctx.activation, grad, argument)
    grad_x = grad_bias = None
    if need_x:
        grad_x = grad @ torch.ops.sparsekit.to_dense(packed, ctx.n, ctx.k, ctx.dtype)
    if need_bias:
        grad_bias = grad.reshape(-1, ctx.n).sum(0)
    return grad_x, None, None, grad_bias, None, grad_residual, None


def _activation_backward(activation: str, grad: Tensor, argument: Tensor) -> Tensor:
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, argument, 0)
    if activation == "silu":
        return aten.silu_backward(grad, argument)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(grad, argument, approximate=approximate)


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("to_dense", _to_dense_cpu, "CPU")
torch.library.register_fake("sparsekit::linear", _linear_fake, lib=_library)
torch.library.register_fake("sparsekit::to_dense", _to_dense_fake, lib=_library)
torch.library.register_autograd(
    "sparsekit::linear", _linear_backward, setup_context=_linear_setup, lib=_library
)

linear = torch.ops.sparsekit.linear.default
