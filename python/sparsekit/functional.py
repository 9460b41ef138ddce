"""Functions on packed weights, with every argument checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit import _ops
from sparsekit.pack import PackedWeight


def linear(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias) + residual` with a packed sparse `W[n, k]`.

    Gradients flow to x, bias and residual; the weight is frozen. The backward pass unpacks the
    dense weight each time and keeps nothing between calls. Under `torch.autocast`, x, bias and
    residual are converted to the weight's dtype, which is also the result's.

    Args:
        x: `[..., k]`, any number of leading dimensions (their product may be 0), any strides.
        p: the weight, from `sparsekit.pack`.
        bias: `[n]`.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        residual: `[..., n]`, the shape of the result.

    Returns:
        `[..., n]`, contiguous, of the weight's dtype. Accumulation is in float32.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit.
        NotImplementedError: no kernel can run here.
        RuntimeError: the GPU failed.
    """
    if not isinstance(p, PackedWeight):
        raise ValueError(
            f"linear: expected a PackedWeight, got {type(p).__name__}; make one with sparsekit.pack"
        )
    n, k = p.shape
    return linear_packed(x, p.data, n, k, p.dtype, bias, activation, residual, p.meta.header)


def linear_packed(
    x: Tensor,
    data: Tensor,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    """`linear` on the bytes and sizes of a packed weight; what modules call."""
    device = data.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    _check(x, data, n, k, dtype, bias, activation, residual)
    # On a CPU the header is read from the bytes; graphs need not carry it.
    header = None if device == "cpu" else header
    return _ops.linear_direct(x, data, n, bias, activation, residual, None, header)


def _check(
    x: Tensor,
    data: Tensor,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    shape = x.shape
    if len(shape) == 0:
        raise ValueError(f"linear: x is a scalar, expected [..., k] with k={k}")
    if shape[-1] != k:
        advice = f"pass x[..., :{k}]" if shape[-1] > k else f"pad x to {k} columns"
        raise ValueError(
            f"linear: x has k={shape[-1]}, the packed weight has k={k}; {advice} or repack."
        )
    _check_tensor("x", x, data, dtype)
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(
                f"linear: bias has shape {list(bias.shape)}, the packed weight has n={n}; "
                f"expected [{n}]"
            )
        _check_tensor("bias", bias, data, dtype)
    if residual is not None:
        if residual.shape[:-1] != shape[:-1] or residual.dim() == 0 or residual.shape[-1] != n:
            raise ValueError(
                f"linear: residual has shape {list(residual.shape)}, the result has "
                f"{[*shape[:-1], n]}; expected the same (expand it if it should broadcast)"
            )
        _check_tensor("residual", residual, data, dtype)
    if activation not in _ops.ACTIVATIONS:
        raise ValueError(
            f"linear: unknown activation {activation!r}; expected one of {_ops.ACTIVATIONS}"
        )


def _check_tensor(name: str, tensor: Tensor, data: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(
            f"linear: {name} is {tensor.dtype}, the packed weight is {dtype}; convert {name} with "
            f".to({dtype}), the weight with PackedWeight.to, or use torch.autocast"
        )
    if tensor.device != data.device:
        raise ValueError(
            f"linear: {name} is on {tensor.device}, the packed weight on {data.device}; "
            f"move one of them with .to()"
        )
