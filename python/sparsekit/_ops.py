"""The torch operators: `torch.ops.sparsekit.linear`, `conv2d` and `to_dense`.

All take packed bytes (uint8) and plain sizes, so that compiled and exported graphs carry them
without any Python object. A weight on a GPU comes with its header, which the host reads, as 13
integers for each group of a convolution (`PackedMeta.header`). Arguments are checked by
`sparsekit.functional` and, before an address is read, once more by the native code.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekit import _native, preferences

ACTIVATIONS = tuple(_native.ACTIVATIONS)

_library = torch.library.Library("sparsekit", "DEF")
_library.define(
    "linear(Tensor x, Tensor packed, int n, Tensor? bias=None, str? activation=None, "
    "Tensor? residual=None, str? kernel_id=None, int[]? header=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "conv2d(Tensor x, Tensor packed, int n, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, int groups, int tap, Tensor? bias=None, str? activation=None, "
    "Tensor? residual=None, bool residual_first=False, str? kernel_id=None, int[]? header=None) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "to_dense(Tensor packed, int n, int k, ScalarType dtype, int[]? header=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear_direct(
    x: Tensor,
    packed: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    """`linear`, without torch's dispatcher where nobody could tell the difference.

    The way through it costs more than a small layer. It is left out when every argument is a plain
    tensor, no gradient is wanted and nothing watches: no compiler, tracer, profiler, mode or
    functorch transform, all of which the dispatcher would otherwise show the operator to.
    """
    if torch.compiler.is_compiling() or not _is_unwatched(x, packed, bias, residual):
        return linear(x, packed, n, bias, activation, residual, kernel_id, header)
    run = _linear_cuda if x.is_cuda else _linear_cpu
    return run(x, packed, n, bias, activation, residual, kernel_id, header)


def conv2d_direct(
    x: Tensor,
    packed: Tensor,
    n: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tap: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    """`conv2d`, without torch's dispatcher as `linear_direct`.

    Args:
        x: `[batch, channels, height, width]`, of any strides.
        padding: top, left, bottom, right.
        tap: columns of the packed weight for each of the kernel's positions.
        residual: of the shape of the result, added before the activation if `residual_first`.

    Returns:
        `[batch, n, out height, out width]`, `channels_last`.
    """
    run: Any = conv2d
    if not torch.compiler.is_compiling() and _is_unwatched(x, packed, bias, residual):
        run = _conv2d
    return run(
        x,
        packed,
        n,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        tap,
        bias,
        activation,
        residual,
        residual_first,
        kernel_id,
        header,
    )


def conv2d_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(height, width) of the output for an image of `size`; below 1 where the kernel does not fit.

    Args:
        padding: top, left, bottom, right.
    """
    top, left, bottom, right = padding
    height = size[0] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1
    width = size[1] + left + right - dilation[1] * (kernel_size[1] - 1) - 1
    return height // stride[0] + 1, width // stride[1] + 1


def _plain_keys() -> int:
    """The dispatch keys of a tensor that is nothing but memory on a CPU or a GPU."""
    keys = torch._C.DispatchKey
    plain = 0
    for key in (keys.CPU, keys.CUDA, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        plain |= torch._C.DispatchKeySet(key).raw_repr()
    # Always in the thread's set, and of no meaning to an operator that has tensors.
    return plain | torch._C.DispatchKeySet(keys.BackendSelect).raw_repr()


_PLAIN_KEYS = _plain_keys()
_PLAIN_TYPES = (Tensor, Parameter)


def _is_unwatched(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would go straight to the CPU's or the GPU's function."""
    if torch._C._is_torch_function_mode_enabled() or torch._C._autograd._profiler_enabled():
        return False
    gradients = torch.is_grad_enabled()
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or (gradients and tensor.requires_grad):
            return False
        keys |= torch._C._dispatch_keys(tensor).raw_repr()
    return not keys & ~torch._C._dispatch_tls_local_exclude_set().raw_repr() & ~_PLAIN_KEYS


def _linear_cpu(
    x: Tensor,
    packed: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], n))
    _native.matmul(
        _rows(x),
        packed,
        y if y.dim() == 2 else y.view(-1, n),
        bias if bias is None or bias.is_contiguous() else bias.contiguous(),
        activation,
        None if residual is None else _rows(residual),
        kernel=kernel_id,
    )
    return y


def _linear_cuda(
    x: Tensor,
    packed: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    gpu = _gpu_call(_given("linear", header), x.device)
    y = x.new_empty((*x.shape[:-1], n))
    _native.matmul(
        _aligned_rows(x),
        packed,
        y if y.dim() == 2 else y.view(-1, n),
        bias if bias is None or bias.is_contiguous() else bias.contiguous(),
        activation,
        None if residual is None else _rows(residual),
        kernel=kernel_id,
        gpu=gpu,
    )
    return y


def _conv2d(
    x: Tensor,
    packed: Tensor,
    n: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tap: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    out_size = conv2d_size(x.shape[2:], kernel_size, stride, padding, dilation)
    shape = _native.Conv2dShape(
        (kernel_size[0], kernel_size[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        out_size,
    )
    gpu = _gpu_call(_given("conv2d", header), x.device) if x.is_cuda else None
    y = _images(x, n, out_size)
    # What is no group's own: converted once.
    images = _pixels(x)
    added = None if residual is None else _laid_out_as(y, residual)
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    for group in range(groups):
        part = _part(images, 1, group, groups)
        _native.conv2d(
            _aligned_pixels(part) if gpu else part,
            kernel_size[0] * kernel_size[1] * tap,
            shape,
            _part(packed, 0, group, groups),
            _part(y, 1, group, groups),
            None if bias is None else _part(bias, 0, group, groups),
            activation,
            None if added is None else _part(added, 1, group, groups),
            residual_first,
            kernel_id,
            gpu and gpu._replace(header=_header_part(gpu.header, group, groups)),
        )
    return y


def _images(x: Tensor, n: int, size: Sequence[int]) -> Tensor:
    # Not a view of [batch, height, width, n]: what follows may work in place.
    return torch.empty(
        (x.shape[0], n, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _part(x: Tensor, dim: int, group: int, groups: int) -> Tensor:
    """What of x is a group's, along one dimension."""
    if groups == 1:
        return x
    size = x.shape[dim] // groups
    return x.narrow(dim, group * size, size)


def _header_part(header: Sequence[int], group: int, groups: int) -> Sequence[int]:
    size = len(header) // groups
    return header[group * size : (group + 1) * size]


def _gpu_call(header: Sequence[int], device: torch.device) -> _native.GpuCall:
    stream = torch.cuda.current_stream(device).cuda_stream
    return _native.GpuCall(header, stream, _workspace(device, stream))


def _given(op: str, header: Sequence[int] | None) -> Sequence[int]:
    if header is None:
        raise ValueError(
            f"{op}: a packed weight on a GPU needs its header; pass header=PackedMeta.header"
        )
    return header


_workspaces: dict[tuple[int, int], Tensor] = {}


def _workspace(device: torch.device, stream: int) -> Tensor:
    """Counters and partial sums for calls on one stream, which never overlap.

    In a captured graph each call gets its own, whose counters the graph zeroes: graphs captured on
    one stream may be replayed on several at once, and what outlives its call in the memory of a
    graph is an error to torch.compile.
    """
    if torch.cuda.is_current_stream_capturing():
        return _new_workspace(device)
    key = (device.index, stream)
    workspace = _workspaces.get(key)
    if workspace is None:
        # By a thread of its own: before it captures, torch.compile lets the calling one allocate
        # from the graphs' memory as well.
        with ThreadPoolExecutor(1) as executor:
            workspace = executor.submit(_new_workspace, device, wait=True).result()
        _workspaces[key] = workspace
    return workspace


def _new_workspace(device: torch.device, wait: bool = False) -> Tensor:
    preferences.load(device)  # what comes before the first call on a GPU
    nbytes: int = _native.cuda_info(device.index)["workspace_bytes"]
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
    workspace[: _native.CUDA_COUNTER_BYTES].zero_()
    if wait:
        torch.cuda.current_stream(device).synchronize()
    return workspace


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows do not overlap and whose last dimension is contiguous."""
    rows = _matrix(x)
    stride, step = rows.stride()
    if step == 1 and (stride >= rows.shape[1] or rows.shape[0] <= 1):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


_ROW_ALIGNMENT = 16


def _aligned_rows(x: Tensor) -> Tensor:
    """The same with every row on a multiple of 16 bytes, which the kernels on GPUs copy at once."""
    rows = _matrix(x)
    (m, k), (stride, step), size = rows.shape, rows.stride(), rows.element_size()
    if m <= 1:
        stride = 0
    elif stride < k:
        step = 0
    if step == 1 and rows.data_ptr() % _ROW_ALIGNMENT == 0 and stride * size % _ROW_ALIGNMENT == 0:
        return rows
    unit = _ROW_ALIGNMENT // size
    return x.new_empty((m, -(-k // unit) * unit))[:, :k].copy_(rows)


def _laid_out_as(y: Tensor, residual: Tensor) -> Tensor:
    if residual.stride() == y.stride():
        return residual
    return torch.empty_like(y).copy_(residual)


# In a network the code of torch is in no cache when a layer begins: each of its functions costs
# tens of microseconds then, and sizes and strides are looked at in Python instead.
def _pixels(x: Tensor) -> Tensor:
    """Images whose channels lie side by side and whose pixels, lines and images do not overlap."""
    _, channels, height, width = x.shape
    image, channel, line, pixel = x.stride()
    step = pixel if width > 1 else channels
    lines = line if height > 1 else (width - 1) * step + channels
    if (
        (channel == 1 or channels == 1)
        and step >= channels
        and lines >= (width - 1) * step + channels
        and (x.shape[0] <= 1 or image >= (height - 1) * lines + (width - 1) * step + channels)
    ):
        return x
    return x.clone(memory_format=torch.channels_last)


def _aligned_pixels(x: Tensor) -> Tensor:
    """The same with every pixel on a multiple of 16 bytes, which the kernels on GPUs copy at once.

    Args:
        x: as `_pixels` gives it.
    """
    size = x.element_size()
    image, _, line, pixel = x.stride()
    batch, channels, height, width = x.shape
    strides = ((batch, image), (height, line), (width, pixel))
    aligned = all(count <= 1 or stride * size % _ROW_ALIGNMENT == 0 for count, stride in strides)
    if aligned and x.data_ptr() % _ROW_ALIGNMENT == 0:
        return x
    unit = _ROW_ALIGNMENT // size
    buffer = x.new_empty((batch, height, width, -(-channels // unit) * unit))
    return buffer[..., :channels].permute(0, 3, 1, 2).copy_(x)


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _conv2d_fake(
    x: Tensor,
    packed: Tensor,
    n: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
    **__: Any,
) -> Tensor:
    return _images(x, n, conv2d_size(x.shape[2:], kernel_size, stride, padding, dilation))


def _to_dense_cpu(
    packed: Tensor, n: int, k: int, dtype: torch.dtype, header: Sequence[int] | None = None
) -> Tensor:
    return _native.decompress(_native.unpack(packed))


def _to_dense_cuda(
    packed: Tensor, n: int, k: int, dtype: torch.dtype, header: Sequence[int] | None = None
) -> Tensor:
    header = _given("to_dense", header)
    if _native.header_format(header, packed) == _native.CUDA_FORMAT:
        return _native.unpack_cuda(packed, header, (n, k), dtype)
    # The sums of W times the identity have one term that is not zero: they are exact, and the bytes
    # stay where they are.
    identity = torch.eye(k, dtype=dtype, device=packed.device)
    return _linear_cuda(identity, packed, n, header=header).t().contiguous()


def _to_dense_fake(
    packed: Tensor, n: int, k: int, dtype: torch.dtype, header: Sequence[int] | None = None
) -> Tensor:
    return packed.new_empty((n, k), dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, n, bias, activation, _, kernel_id, header = inputs
    ctx.n, ctx.k, ctx.dtype = n, x.shape[-1], x.dtype
    ctx.activation, ctx.kernel_id, ctx.header = activation, kernel_id, header
    # x is needed only to find the activation's argument again.
    ctx.save_for_backward(x if activation is not None else None, packed, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, bias = ctx.saved_tensors
    # Arguments left at their default at the end of the call are not listed.
    needs: tuple[bool, ...] = ctx.needs_input_grad
    need_x, _, _, need_bias, _, need_residual, *_ = needs + (False,) * 7
    grad_residual = grad if need_residual else None
    if (need_x or need_bias) and ctx.activation is not None:
        argument = torch.ops.sparsekit.linear(
            x, packed, ctx.n, bias, None, None, ctx.kernel_id, ctx.header
        )
        grad = _activation_backward(ctx.activation, grad, argument)
    grad_x = grad_bias = None
    if need_x:
        dense = torch.ops.sparsekit.to_dense(packed, ctx.n, ctx.k, ctx.dtype, ctx.header)
        grad_x = grad @ dense
    if need_bias:
        grad_bias = grad.reshape(-1, ctx.n).sum(0)
    return grad_x, None, None, grad_bias, None, grad_residual, None, None


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, n, *geometry, bias, activation, residual, first, kernel_id, header = inputs
    ctx.n, ctx.geometry, ctx.size, ctx.dtype = n, geometry, x.shape, x.dtype
    ctx.activation, ctx.residual_first = activation, first
    ctx.kernel_id, ctx.header = kernel_id, header
    # The activation's argument is computed again, from these.
    again = activation is not None
    ctx.save_for_backward(x if again else None, packed, bias, residual if again and first else None)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, bias, residual = ctx.saved_tensors
    needs: tuple[bool, ...] = ctx.needs_input_grad
    needs += (False,) * (15 - len(needs))
    need_x, need_bias, need_residual = needs[0], needs[9], needs[11]
    grad_x = grad_bias = None
    grad_residual = grad if need_residual else None
    if ctx.activation is not None and (need_x or need_bias or ctx.residual_first):
        argument = torch.ops.sparsekit.conv2d(
            x,
            packed,
            ctx.n,
            *ctx.geometry,
            bias,
            None,
            residual,
            ctx.residual_first,
            ctx.kernel_id,
            ctx.header,
        )
        grad = _activation_backward(ctx.activation, grad, argument)
    if need_residual and ctx.residual_first:
        grad_residual = grad
    if need_x:
        grad_x = _conv2d_input_gradient(ctx, packed, grad)
    if need_bias:
        grad_bias = grad.sum((0, 2, 3))
    gradients: list[Tensor | None] = [None] * 15
    gradients[0], gradients[9], gradients[11] = grad_x, grad_bias, grad_residual
    return tuple(gradients)


def _conv2d_input_gradient(ctx: Any, packed: Tensor, grad: Tensor) -> Tensor:
    """Through the dense filters."""
    (height, width), stride, (top, left, bottom, right), dilation, groups, tap = ctx.geometry
    batch, channels, *size = ctx.size
    rows, k = ctx.n // groups, height * width * tap
    matrix = torch.cat(
        [
            torch.ops.sparsekit.to_dense(
                _part(packed, 0, group, groups),
                rows,
                k,
                ctx.dtype,
                None if ctx.header is None else _header_part(ctx.header, group, groups),
            )
            for group in range(groups)
        ]
    )
    weight = matrix.view(ctx.n, height, width, tap)[..., : channels // groups].permute(0, 3, 1, 2)
    # Of the image and all of its padding, which may differ from side to side.
    padded = (batch, channels, size[0] + top + bottom, size[1] + left + right)
    image = torch.empty(
        padded, dtype=ctx.dtype, device=grad.device, memory_format=torch.channels_last
    )
    grad_padded, _, _ = torch.ops.aten.convolution_backward(
        grad.contiguous(memory_format=torch.channels_last),
        image,
        weight.contiguous(memory_format=torch.channels_last),
        None,
        stride,
        [0, 0],
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )
    return grad_padded[:, :, top : top + size[0], left : left + size[1]]


def _activation_backward(activation: str, grad: Tensor, argument: Tensor) -> Tensor:
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, argument, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(grad, argument, 0, 6)
    if activation == "silu":
        return aten.silu_backward(grad, argument)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(grad, argument, approximate=approximate)


for _device, _linear, _to_dense in (
    ("CPU", _linear_cpu, _to_dense_cpu),
    ("CUDA", _linear_cuda, _to_dense_cuda),
):
    _library.impl("linear", _linear, _device)
    _library.impl("conv2d", _conv2d, _device)
    _library.impl("to_dense", _to_dense, _device)
for _name, _fake in (
    ("linear", _linear_fake),
    ("conv2d", _conv2d_fake),
    ("to_dense", _to_dense_fake),
):
    torch.library.register_fake(f"sparsekit::{_name}", _fake, lib=_library)
for _name, _backward, _setup in (
    ("linear", _linear_backward, _linear_setup),
    ("conv2d", _conv2d_backward, _conv2d_setup),
):
    torch.library.register_autograd(
        f"sparsekit::{_name}", _backward, setup_context=_setup, lib=_library
    )

linear = torch.ops.sparsekit.linear.default
conv2d = torch.ops.sparsekit.conv2d.default
