"""Functions on packed weights, with every argument checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit import _ops
from sparsekit.filters import FilterShape
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
        activation: None, "relu", "gelu" (erf), "gelu_tanh", "silu" or "relu6".
        residual: `[..., n]`, the shape of the result.

    Returns:
        `[..., n]`, contiguous, of the weight's dtype. Accumulation is in float32.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit.
        NotImplementedError: no kernel can run here.
        RuntimeError: the GPU failed.
    """
    _check_packed("linear", p)
    if p.meta.filters is not None:
        raise ValueError(
            f"linear: the packed weight is a convolution's, {list(p.shape)}; use "
            f"sparsekit.conv{p.meta.filters.dims}d or pack a matrix"
        )
    n, k = p.matrix_shape
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
    x, bias, residual = _autocast(data, dtype, x, bias, residual)
    shape = x.shape
    if len(shape) == 0:
        raise ValueError(f"linear: x is a scalar, expected [..., k] with k={k}")
    if shape[-1] != k:
        advice = f"pass x[..., :{k}]" if shape[-1] > k else f"pad x to {k} columns"
        raise ValueError(
            f"linear: x has k={shape[-1]}, the packed weight has k={k}; {advice} or repack."
        )
    _check_tensors("linear", x, data, n, dtype, bias, activation)
    if residual is not None:
        _check_residual("linear", residual, [*shape[:-1], n], data, dtype)
    return _ops.linear_direct(x, data, n, bias, activation, residual, None, _header(data, header))


Pair = int | Sequence[int]
Padding = str | int | Sequence[int]


def conv2d(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
) -> Tensor:
    """`activation(conv2d(x, W) + bias) + residual` with packed sparse filters.

    The result is `channels_last`, as x should be: an x or a residual whose channels do not lie side
    by side is converted first, which costs a copy. Gradients, autocast and accumulation are as in
    `linear`.

    Args:
        x: `[N, Cin, H, W]`, or `[Cin, H, W]` for one image.
        p: the filters `[Cout, Cin / groups, height, width]`, from `sparsekit.pack`.
        bias: `[Cout]`.
        stride: a number, or one for height and one for width.
        padding: zeros on each side: a number, a pair, "valid" for none, or "same" for a result of
            the size of x, which takes a stride of 1; what is odd of it goes below and to the right.
        dilation: between the kernel's positions; a number or a pair.
        groups: those that the filters were packed for.
        activation: None, "relu", "gelu" (erf), "gelu_tanh", "silu" or "relu6".
        residual: of the shape of the result.
        residual_first: `activation(conv2d(x, W) + bias + residual)` instead.

    Returns:
        `[N, Cout, Hout, Wout]` or `[Cout, Hout, Wout]`, of the weight's dtype.

    Raises:
        ValueError: a shape, dtype, device or argument that does not fit.
        NotImplementedError: no kernel can run here.
        RuntimeError: the GPU failed.
    """
    return _conv(
        2, x, p, bias, stride, padding, dilation, groups, activation, residual, residual_first
    )


def conv1d(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
) -> Tensor:
    """`conv2d` for x of `[N, Cin, L]` or `[Cin, L]` and filters `[Cout, Cin / groups, length]`.

    Channels lie side by side in the result: its strides are `(L * Cout, 1, Cout)`.
    """
    return _conv(
        1, x, p, bias, stride, padding, dilation, groups, activation, residual, residual_first
    )


def _conv(
    dims: int,
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str | None,
    residual: Tensor | None,
    residual_first: bool,
) -> Tensor:
    op = f"conv{dims}d"
    _check_packed(op, p)
    filters = p.meta.filters
    if filters is None or filters.dims != dims:
        what = "a matrix" if filters is None else f"that of a conv{filters.dims}d"
        raise ValueError(
            f"{op}: the packed weight is {what}, {list(p.shape)}; pack the weight of a {op}"
        )
    if groups != filters.groups:
        raise ValueError(
            f"{op}: groups={groups}, the weight is packed for groups={filters.groups}; pass "
            f"groups={filters.groups} or repack"
        )
    geometry = conv_geometry(filters, stride, padding, dilation)
    return conv_packed(
        x,
        p.data,
        filters,
        p.matrix_shape[1],
        p.dtype,
        *geometry,
        bias,
        activation,
        residual,
        residual_first,
        p.meta.header,
    )


Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]


def conv_geometry(filters: FilterShape, stride: Pair, padding: Padding, dilation: Pair) -> Geometry:
    """What a convolution's arguments mean: stride, padding (top, left, bottom, right), dilation.

    Raises:
        ValueError: they mean nothing.
    """
    op, dims = f"conv{filters.dims}d", filters.dims
    strides = _pair(op, "stride", stride, dims, 1)
    dilations = _pair(op, "dilation", dilation, dims, 1)
    if not isinstance(padding, str):
        above, left = _pair(op, "padding", padding, dims, 0)
        return strides, (above, left, above, left), dilations
    if padding == "valid":
        return strides, (0, 0, 0, 0), dilations
    if padding != "same":
        raise ValueError(f"{op}: expected padding as numbers, 'same' or 'valid', got {padding!r}")
    if strides != (1, 1):
        raise ValueError(f"{op}: padding='same' takes a stride of 1, got {stride}")
    height, width = (
        step * (size - 1) for step, size in zip(dilations, filters.kernel_size, strict=True)
    )
    top, left = height // 2, width // 2
    return strides, (top, left, height - top, width - left), dilations


def _pair(op: str, name: str, value: Pair, dims: int, least: int) -> tuple[int, int]:
    """(height, width); of a 1-D convolution the height does nothing."""
    numbers: list[Any] = list(value) if isinstance(value, tuple | list) else [value]
    if len(numbers) == 1:
        numbers = numbers * dims
    if len(numbers) != dims or any(
        isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers
    ):
        expected = "one number" if dims == 1 else "one number or two"
        raise ValueError(f"{op}: expected {name} as {expected} of at least {least}, got {value}")
    return (least, numbers[0]) if dims == 1 else (numbers[0], numbers[1])


def conv_packed(
    x: Tensor,
    data: Tensor,
    filters: FilterShape,
    k: int,
    dtype: torch.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    header: Sequence[int] | None = None,
) -> Tensor:
    """`conv1d` and `conv2d` on the bytes and sizes of a packed weight; what modules call.

    Args:
        k: columns of the packed matrix.
        padding: top, left, bottom, right.
    """
    dims = filters.dims
    x, bias, residual = _autocast(data, dtype, x, bias, residual)
    batched = x.dim() == dims + 2
    if (not batched and x.dim() != dims + 1) or x.shape[-dims - 1] != filters.channels:
        raise ValueError(_wrong_image(x, filters))
    _check_tensors(filters.op, x, data, filters.out_channels, dtype, bias, activation)
    images = x if batched and dims == 2 else _as_images(x, dims)
    size = _ops.conv2d_size(images.shape[2:], filters.kernel_size, stride, padding, dilation)
    if size[0] < 1 or size[1] < 1 or 0 in images.shape[2:]:
        raise ValueError(
            f"{filters.op}: the result would be {size[0]}x{size[1]} pixels: x has "
            f"{images.shape[2]}x{images.shape[3]}, the kernel is {filters.kernel_size[0]}x"
            f"{filters.kernel_size[1]} with stride {stride}, dilation {dilation} and padding "
            f"{padding} (top, left, bottom, right); pass a larger x or more padding"
        )
    if residual is not None:
        shape = [filters.out_channels, *size[2 - dims :]]
        if batched:
            shape.insert(0, x.shape[0])
        _check_residual(filters.op, residual, shape, data, dtype)
        residual = _as_images(residual, dims)
    y = _ops.conv2d_direct(
        images,
        data,
        filters.out_channels,
        filters.kernel_size,
        stride,
        padding,
        dilation,
        filters.groups,
        k // filters.taps,
        bias,
        activation,
        residual,
        residual_first,
        None,
        _header(data, header),
    )
    if dims == 1:
        y = y.squeeze(2)
    return y if batched else y.squeeze(0)


def _wrong_image(x: Tensor, filters: FilterShape) -> str:
    dims = filters.dims
    if x.dim() in (dims + 1, dims + 2):
        return (
            f"{filters.op}: x has {x.shape[-dims - 1]} channels (shape {list(x.shape)}), the "
            f"packed weight takes {filters.channels}"
        )
    sizes = "L" if dims == 1 else "H, W"
    return (
        f"{filters.op}: x has shape {list(x.shape)}, expected [N, {filters.channels}, {sizes}], or "
        f"[{filters.channels}, {sizes}] for one image"
    )


def _as_images(x: Tensor, dims: int) -> Tensor:
    """`[N, C, H, W]` of what may be one image, or have one line only."""
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    return x.unsqueeze(2) if dims == 1 else x


# --- what all of them check -------------------------------------------------------------------


def _autocast(
    data: Tensor, dtype: torch.dtype, x: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    device = data.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, bias, residual
    return (
        x.to(dtype),
        None if bias is None else bias.to(dtype),
        None if residual is None else residual.to(dtype),
    )


def _header(data: Tensor, header: Sequence[int] | None) -> Sequence[int] | None:
    """On a CPU the header is read from the bytes; graphs need not carry it."""
    return None if data.device.type == "cpu" else header


def _check_packed(op: str, p: PackedWeight) -> None:
    if not isinstance(p, PackedWeight):
        raise ValueError(
            f"{op}: expected a PackedWeight, got {type(p).__name__}; make one with sparsekit.pack"
        )


def _check_tensors(
    op: str,
    x: Tensor,
    data: Tensor,
    n: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    _check_tensor(op, "x", x, data, dtype)
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(
                f"{op}: bias has shape {list(bias.shape)}, the packed weight has n={n}; "
                f"expected [{n}]"
            )
        _check_tensor(op, "bias", bias, data, dtype)
    if activation not in _ops.ACTIVATIONS:
        raise ValueError(
            f"{op}: unknown activation {activation!r}; expected one of {_ops.ACTIVATIONS}"
        )


def _check_residual(
    op: str, residual: Tensor, shape: Sequence[int], data: Tensor, dtype: torch.dtype
) -> None:
    if list(residual.shape) != shape:
        raise ValueError(
            f"{op}: residual has shape {list(residual.shape)}, the result has "
            f"{shape}; expected the same (expand it if it should broadcast)"
        )
    _check_tensor(op, "residual", residual, data, dtype)


def _check_tensor(op: str, name: str, tensor: Tensor, data: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype}, the packed weight is {dtype}; convert {name} with "
            f".to({dtype}), the weight with PackedWeight.to, or use torch.autocast"
        )
    if tensor.device != data.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, the packed weight on {data.device}; "
            f"move one of them with .to()"
        )
