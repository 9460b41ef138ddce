"""The only caller of the native module ``_C``: tensors become addresses, status codes exceptions.

Everything here but `*_cuda` trusts its caller to pass CPU tensors; sizes, dtypes and indices
are checked by the library before it reads an address.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit import _C
from sparsekit.patterns import NM, BlockSparse, Pattern

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# The format that `pack_cuda` writes and `unpack_cuda` reads.
CUDA_FORMAT = "nm_mma_sp"
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "relu6": 5}

CUDA_COUNTER_BYTES: int = _C.CUDA_COUNTER_BYTES
"""Bytes at the start of a workspace that are zero before and after every call."""

_DEVICE_TYPES = ("cpu", "cuda")
_DTYPES_BACK = {code: dtype for dtype, code in DTYPES.items()}
_KEEP_MASK, _KEEP_NONZERO = 0, 1
_PatternTuple = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Canonical:
    """A pruned weight W[n, k] in the form that files hold (``sk_weight`` of the C interface).

    Attributes:
        pattern: the sparsity pattern.
        shape: (n, k).
        dtype: float32, bfloat16 or float16.
        values: N:M: [n, slots] with slots = ceil(k / M) * N; blocks: [nnzb, rows, cols].
        indices: N:M: uint8 [ceil(n / vector), ceil(slots * bits / 8)], the position of each kept
            value in its group, 2 bits wide for M <= 4 and 4 bits above; blocks: int32 [nnzb], block
            columns.
        crow_indices: blocks: int32 [ceil(n / rows) + 1]; N:M: None.
    """

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor
    crow_indices: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        tensors = (self.values, self.indices, self.crow_indices)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class PackedInfo:
    """What a packed buffer says of itself."""

    format: str
    pattern: Pattern
    dtype: torch.dtype
    shape: tuple[int, int]
    nnzb: int
    nbytes: int


@dataclass(frozen=True)
class KernelInfo:
    """One line of the kernel registry; ``reason`` is why it cannot run here, or what it is for."""

    name: str
    op: str
    format: str
    dtype: str
    arch: str
    variant: str
    available: bool
    reason: str
    device: str  # "cpu" or "cuda": where its tensors are


@dataclass(frozen=True)
class Candidate:
    """How one kernel answers a problem; ``cost_us`` is the cost model's estimate."""

    kernel: str
    ok: bool
    chosen: bool
    cost_us: float | None
    reason: str
    device: str  # "cpu" or "cuda": where its tensors are


@dataclass(frozen=True)
class Preference:
    """A kernel that was measured to be the fastest for these matmuls with m_from <= m <= m_to."""

    format: str
    pattern: Pattern
    dtype: torch.dtype
    n: int
    k: int
    threads: int  # on a CPU
    device: torch.device
    m_from: int
    m_to: int
    kernel: str


def encode_pattern(pattern: Pattern) -> _PatternTuple:
    """The six numbers of a pattern: family, N, M, vector, block rows, block columns."""
    if isinstance(pattern, NM):
        return (0, pattern.n, pattern.m, pattern.vector, 0, 0)
    if isinstance(pattern, BlockSparse):
        return (1, 0, 0, 0, pattern.block_shape[0], pattern.block_shape[1])
    raise TypeError(f"pattern: expected NM or BlockSparse, got {type(pattern).__name__}")


def decode_pattern(code: _PatternTuple, shape: tuple[int, int], nnzb: int) -> Pattern:
    """The pattern of the six numbers; of blocks with the sparsity that so many of them make."""
    family, kept, group, vector, rows, cols = code
    if family == 0:
        return NM(kept, group, vector=vector)
    blocks = -(-shape[0] // rows) * -(-shape[1] // cols)
    return BlockSparse((rows, cols), sparsity=1 - nnzb / blocks)


def _encode_dtype(dtype: torch.dtype) -> int:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype: expected float32, bfloat16 or float16, got {dtype}; cast the weight"
        )
    return DTYPES[dtype]


def _weight(c: Canonical) -> Any:
    def part(tensor: Tensor | None) -> tuple[int, int]:
        if tensor is None:
            return 0, 0
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("canonical weight: expected contiguous CPU tensors")
        return tensor.data_ptr(), tensor.numel() * tensor.element_size()

    return _C.Weight(
        encode_pattern(c.pattern),
        _encode_dtype(c.dtype),
        *c.shape,
        *part(c.values),
        *part(c.indices),
        *part(c.crow_indices),
    )


def canonical_sizes(
    pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int], nnzb: int
) -> tuple[int, int, int]:
    """Bytes of values, indices and crow_indices (ValueError for sizes that no weight has)."""
    sizes = _C.weight_sizes(encode_pattern(pattern), _encode_dtype(dtype), *shape, nnzb)
    return tuple(sizes)


def empty_canonical(
    pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int], nnzb: int
) -> Canonical:
    """Arrays of the right sizes, to be filled; nnzb is 0 for N:M."""
    values_bytes, indices_bytes, crow_bytes = canonical_sizes(pattern, dtype, shape, nnzb)
    values = torch.empty(values_bytes // dtype.itemsize, dtype=dtype)
    if isinstance(pattern, NM):
        values = values.view(shape[0], -1)
        indices = torch.empty(indices_bytes, dtype=torch.uint8).view(
            -(-shape[0] // pattern.vector), -1
        )
        return Canonical(pattern, shape, dtype, values, indices, None)
    assert isinstance(pattern, BlockSparse)
    values = values.view(nnzb, *pattern.block_shape)
    indices = torch.empty(indices_bytes // 4, dtype=torch.int32)
    crow = torch.empty(crow_bytes // 4, dtype=torch.int32)
    return Canonical(pattern, shape, dtype, values, indices, crow)


def compress(weight: Tensor, mask: Tensor, pattern: Pattern) -> Canonical:
    """Dense [n, k] and bool mask [n, k] to canonical.

    Raises:
        ValueError: the mask does not fit the pattern; the message says where first.
    """
    shape = (weight.shape[0], weight.shape[1])
    weight = weight.detach().contiguous()
    mask = mask.to(torch.bool).contiguous()
    code = encode_pattern(pattern)
    nnzb = 0 if isinstance(pattern, NM) else _C.count_blocks(code, mask.data_ptr(), *shape)
    out = empty_canonical(pattern, weight.dtype, shape, nnzb)
    _C.compress(weight.data_ptr(), shape[1], mask.data_ptr(), _weight(out))
    return out


def decompress(c: Canonical) -> Tensor:
    """Canonical to dense [n, k]; pruned positions are zero."""
    dense = torch.empty(c.shape, dtype=c.dtype)
    _C.decompress(_weight(c), dense.data_ptr(), c.shape[1])
    return dense


def validate(c: Canonical) -> None:
    """Refuses arrays of the wrong size and indices out of range or out of order (ValueError)."""
    expected = {"values": c.dtype}
    if isinstance(c.pattern, NM):
        expected["indices"] = torch.uint8
    else:
        expected |= {"indices": torch.int32, "crow_indices": torch.int32}
    for name, dtype in expected.items():
        tensor = getattr(c, name)
        if tensor is None or tensor.dtype != dtype:
            got = "nothing" if tensor is None else tensor.dtype
            raise ValueError(f"{name}: expected {dtype}, got {got}")
    _C.validate(_weight(c))


def pack(c: Canonical, format: str) -> Tensor:
    """Canonical to the bytes of a format: uint8 [bytes].

    The library wants a cache line's alignment, which torch's CPU allocator gives.
    """
    weight = _weight(c)
    data = torch.empty(_C.packed_bytes(weight, format), dtype=torch.uint8)
    _C.pack(weight, format, data.data_ptr(), data.numel())
    return data


def format_bytes(
    format: str, pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int], nnzb: int
) -> int:
    """How long a packed buffer is (ValueError where the format does not hold the weight)."""
    code = encode_pattern(pattern)
    return int(_C.format_bytes(code, _encode_dtype(dtype), *shape, nnzb, format))


def packed_info(data: Tensor) -> PackedInfo:
    """Reads the header of a packed buffer (ValueError when it is none)."""
    format, code, dtype, n, k, nnzb, nbytes = _C.packed_info(data.data_ptr(), data.numel())
    pattern = decode_pattern(code, (n, k), nnzb)
    return PackedInfo(format, pattern, _DTYPES_BACK[dtype], (n, k), nnzb, nbytes)


def packed_header(data: Tensor) -> tuple[int, ...]:
    """The header of a packed buffer as integers, for `*_cuda` (ValueError when it is none)."""
    return tuple(_C.packed_header(data.data_ptr(), data.numel()))


def header_format(header: Sequence[int], data: Tensor) -> str:
    """The format of a packed buffer anywhere, from its header (ValueError when it is none)."""
    return str(_C.header_format(header, data.numel()))


def unpack(data: Tensor) -> Canonical:
    """A packed buffer back to canonical, bit for bit."""
    info = packed_info(data)
    out = empty_canonical(info.pattern, info.dtype, info.shape, info.nnzb)
    _C.unpack(data.data_ptr(), data.numel(), _weight(out))
    return out


def pack_cuda(
    weight: Tensor, mask: Tensor | None, pattern: Pattern
) -> tuple[Tensor, tuple[int, ...]]:
    """Dense [n, k] on a GPU to the bytes of `CUDA_FORMAT` there, and their header.

    Waits for the current stream.

    Args:
        weight: finite, bfloat16 or float16, any strides.
        mask: bool [n, k] on the same GPU; None, for a vector of 1, keeps what is not zero, and
            where that does not fit the largest magnitudes.

    Raises:
        ValueError: the mask does not fit the pattern; the message says where first.
    """
    n, k = weight.shape
    code, dtype = encode_pattern(pattern), _encode_dtype(weight.dtype)
    nbytes = format_bytes(CUDA_FORMAT, pattern, weight.dtype, (n, k), 0)
    weight = _packed_rows(weight.detach())
    mask = None if mask is None else _packed_rows(mask.to(torch.bool))
    data = torch.empty(nbytes, dtype=torch.uint8, device=weight.device)
    misfit = torch.empty(1, dtype=torch.int64, device=weight.device)
    header = _C.pack_cuda(
        code,
        dtype,
        n,
        k,
        weight.data_ptr(),
        weight.stride(0),
        _KEEP_NONZERO if mask is None else _KEEP_MASK,
        0 if mask is None else mask.data_ptr(),
        0 if mask is None else mask.stride(0),
        data.data_ptr(),
        nbytes,
        misfit.data_ptr(),
        weight.device.index,
        torch.cuda.current_stream(weight.device).cuda_stream,
    )
    return data, tuple(header)


def _packed_rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows do not overlap and whose last dimension is contiguous."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def unpack_cuda(
    data: Tensor, header: Sequence[int], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`CUDA_FORMAT` on a GPU to dense [n, k] there; starts the kernel on the current stream."""
    dense = torch.empty(shape, dtype=dtype, device=data.device)
    _C.unpack_cuda(
        data.data_ptr(),
        data.numel(),
        header,
        *shape,
        _encode_dtype(dtype),
        dense.data_ptr(),
        shape[1],
        data.device.index,
        torch.cuda.current_stream(data.device).cuda_stream,
    )
    return dense


def default_format(
    pattern: Pattern, dtype: torch.dtype, target: str = "auto", op: str = "matmul"
) -> str:
    """The format whose kernel is the best here.

    Args:
        target: "auto" or "cpu" for this CPU, "reference" for the canonical layout, "cuda" or
            "cuda:<index>" for a GPU ("cuda" without any: for compute capability 8.0).
        op: "matmul" or "conv2d".

    Raises:
        NotImplementedError: no kernel on a GPU takes the pattern; with each kernel's reason.
    """
    code, number = encode_pattern(pattern), _encode_dtype(dtype)
    format = str(_C.default_format(code, number, target))
    if op == "matmul" or target.startswith("cuda"):
        return format
    # The format that is the best for a matmul need not have a kernel for convolutions; the
    # canonical one does. The size is any that fills a machine.
    answers = explain(format, pattern, dtype, n=1024, k=1024, m=256, op=op)
    return (
        format if any(a.ok for a in answers) else str(_C.default_format(code, number, "reference"))
    )


def target_of(device: torch.device) -> str:
    """The target of `default_format` for a device."""
    if device.type != "cuda":
        return "auto"
    return "cuda" if device.index is None else f"cuda:{device.index}"


class GpuCall(NamedTuple):
    """What a call on a GPU takes beside its tensors; the call starts the kernel and returns.

    Attributes:
        header: of the packed weight, on the host.
        stream: the cudaStream_t.
        workspace: uint8, of the size that `cuda_info` says, its first `CUDA_COUNTER_BYTES` zero;
            calls that may run at the same time need different ones.
    """

    header: Sequence[int]
    stream: int
    workspace: Tensor


class Conv2dShape(NamedTuple):
    """Where a convolution finds its pixels: sizes as (height, width), padding as (top, left).

    What lies outside the image reads as zero, so the padding at the bottom and the right is
    whatever `out_size` asks for.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    out_size: tuple[int, int]


def matmul(
    x: Tensor,
    data: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    kernel: str | None = None,
    gpu: GpuCall | None = None,
) -> None:
    """y = activation(x @ W.T + bias) + residual, into y.

    Args:
        x: [m, k], last dimension contiguous, the packed weight's dtype; on a GPU its rows lie on
            multiples of 16 bytes.
        data: a packed buffer.
        y: [m, n], last dimension contiguous, same dtype.
        bias: [n] or None. residual: [m, n] or None.
        residual_first: adds the residual before the activation.
        kernel: forces one kernel by its id.
        gpu: given when the tensors are on a GPU.
    """
    _C.matmul(
        x.shape[0],
        y.shape[1],
        x.shape[1],
        DTYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        *_operands(data, y, bias, activation, residual, residual_first),
        kernel,
        gpu and _gpu(x, gpu),
    )


def conv2d(
    x: Tensor,
    k: int,
    shape: Conv2dShape,
    data: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_first: bool = False,
    kernel: str | None = None,
    gpu: GpuCall | None = None,
) -> None:
    """The same for images: row (image, line, pixel) of y is that pixel of the output.

    Args:
        x: [batch, channels, height, width] with channels side by side (`channels_last`).
        k: columns of the packed weight; its columns are [kernel height, width, channels], padded.
        y: [batch * out height * out width, n], or what `torch.empty` makes of [batch, n, out
            height, out width] in `channels_last`, or some channels of that; residual alike.
    """
    batch, channels, height, width = x.shape
    image_stride, _, line_stride, pixel_stride = x.stride()
    if width == 1:  # this stride says nothing; so, images of one pixel are the rows of a matrix
        pixel_stride = line_stride if height > 1 else image_stride
    _C.conv2d(
        y.shape[0] if y.dim() == 2 else batch * shape.out_size[0] * shape.out_size[1],
        y.shape[1],
        k,
        DTYPES[x.dtype],
        x.data_ptr(),
        (
            *(batch, height, width, channels),
            *(image_stride, line_stride, pixel_stride),
            *shape.kernel_size,
            *shape.stride,
            *shape.dilation,
            *shape.padding,
            *shape.out_size,
        ),
        *_operands(data, y, bias, activation, residual, residual_first),
        kernel,
        gpu and _gpu(x, gpu),
    )


def _row_stride(y: Tensor) -> int:
    # Of a matrix, or from pixel to pixel.
    return y.stride(0) if y.dim() == 2 else y.stride(3)


def _operands(
    data: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    residual_first: bool,
) -> tuple[int, ...]:
    return (
        data.data_ptr(),
        data.numel(),
        y.data_ptr(),
        _row_stride(y),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else _row_stride(residual),
        residual_first,
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )


def _gpu(x: Tensor, call: GpuCall) -> tuple[int, int, Sequence[int], int, int]:
    workspace = call.workspace
    return x.device.index, call.stream, call.header, workspace.data_ptr(), workspace.numel()


def kernels() -> list[KernelInfo]:
    """The registry."""
    return [KernelInfo(*row) for row in _C.kernels()]


def explain(
    format: str,
    pattern: Pattern,
    dtype: torch.dtype,
    n: int,
    k: int,
    m: int,
    device: torch.device | None = None,
    op: str = "matmul",
) -> list[Candidate]:
    """Every kernel's answer to a problem on a device (None: this CPU), in the registry's order."""
    device = torch.device("cpu") if device is None else device
    rows = _C.explain(
        op,
        format,
        encode_pattern(pattern),
        _encode_dtype(dtype),
        m,
        n,
        k,
        torch.get_num_threads(),
        _DEVICE_TYPES.index(device.type),
        device.index or 0,
    )
    return [
        Candidate(name, ok, chosen, cost if ok else None, reason, where)
        for name, ok, chosen, cost, reason, where in rows
    ]


def prefer_kernel(preferences: Sequence[Preference]) -> None:
    """Lets kernels run where they can instead of the cost model's choice, all or none of them.

    Raises:
        ValueError: a kernel that does not exist, or that takes no such problem.
    """
    rows = [
        (
            p.format,
            encode_pattern(p.pattern),
            _encode_dtype(p.dtype),
            p.n,
            p.k,
            p.threads,
            _DEVICE_TYPES.index(p.device.type),
            p.device.index or 0,
            p.m_from,
            p.m_to,
            p.kernel,
        )
        for p in preferences
    ]
    _C.prefer_kernel("matmul", rows)


def clear_preferences() -> None:
    """Leaves every choice to the cost model again."""
    _C.clear_preferences()


def preference_count() -> int:
    """Ranges of m that have a preferred kernel."""
    return int(_C.preference_count())


def cpu_info() -> dict[str, Any]:
    """Model, features, ISA level in use and detected, cores, cache sizes in bytes, thread pool."""
    return dict(_C.cpu_info())


def cuda_device_count() -> int:
    """GPUs that the library sees. This starts the CUDA driver."""
    return int(_C.cuda_device_count())


@functools.cache
def cuda_info(index: int) -> dict[str, Any]:
    """Name, compute capability, sizes in bytes and versions of a GPU.

    Raises:
        NotImplementedError: there is none; the message says why.
        ValueError: there is none with this index.
    """
    return dict(_C.cuda_info(index))


def ptx_folder() -> Path:
    """Where a build with CUDA has its kernels as PTX: beside the native module."""
    return Path(_C.__file__).parent / "_ptx"


def cuda_version(version: int) -> str:
    """13010 as "13.1"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def cuda_unavailable_reason() -> str:
    """Why the library sees no GPU, or ""."""
    if cuda_device_count():
        return ""
    try:
        cuda_info(0)
    except NotImplementedError as error:
        return str(error).removeprefix("CUDA: ")
    return ""


def build_info() -> dict[str, str]:
    """Version, compiler and options of the native build."""
    return dict(_C.build_info())


def installed(name: str) -> Path | None:
    """What the build installed beside the native module, if it did."""
    path = Path(_C.__file__).parent / name
    return path if path.exists() else None


def tensorrt_plugin() -> Path | None:
    """The TensorRT plugin library, if this build has one."""
    return installed("libsparsekit_tensorrt.so")


def reload_environment() -> None:
    """Reads SPARSEKIT_ISA and SPARSEKIT_KERNEL again."""
    _C.reload_environment()
