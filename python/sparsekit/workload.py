"""A layer with the size of its input: every dense way to compute it, and the sparse one.

On a CPU the dense ways are torch's own operation and oneDNN with its private weight layout (what a
frozen, compiled torch graph calls); on a GPU they are torch's (cuBLASLt, cuDNN). Convolutions are
tried in both memory formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit._ops import conv2d_size
from sparsekit.clock import Call
from sparsekit.dispatch import explain
from sparsekit.filters import FilterShape
from sparsekit.functional import Padding, Pair, conv1d, conv2d, conv_geometry, linear
from sparsekit.pack import PackedWeight

# Name, numbers and algorithm of an activation in oneDNN's operators.
_ONEDNN_ACTIVATION: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
}


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation of an epilogue, by its name, with torch's own functions."""
    if activation is None:
        return y
    if activation == "relu":
        return functional.relu(y)
    if activation == "relu6":
        return functional.relu6(y)
    if activation == "silu":
        return functional.silu(y)
    return functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def dense_paths(
    weight: Tensor, bias: Tensor | None, activation: str | None, x: Tensor
) -> dict[str, Call]:
    """The dense ways to compute a linear layer that this torch has, ready to be called.

    Args:
        weight: `[n, k]`.
        bias: `[n]` or None.
        activation: as in `sparsekit.linear`.
        x: `[m, k]`, m >= 1.
    """
    paths: dict[str, Call] = {
        "torch": lambda: activate(functional.linear(x, weight, bias), activation)
    }
    attribute, numbers, algorithm = _ONEDNN_ACTIVATION[activation]

    def onednn() -> Call:
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, x.shape[0])
        return lambda: ops._linear_pointwise(x, packed, bias, attribute, numbers, algorithm)

    return _with_onednn(paths, weight, onednn)


def _with_onednn(
    paths: dict[str, Call], weight: Tensor, build: Callable[[], Call]
) -> dict[str, Call]:
    if weight.device.type != "cpu":
        return paths
    try:
        call = build()
        call()
    except (AttributeError, NotImplementedError, RuntimeError):
        return paths  # a torch without oneDNN, or oneDNN without this dtype on this CPU
    return {**paths, "oneDNN": call}


class Workload(ABC):
    """What is measured: a packed layer and the size of its input.

    Attributes:
        packed: the weight.
        bias: of the layer, or None.
        activation: fused after the bias, or None.
    """

    packed: PackedWeight
    bias: Tensor | None
    activation: str | None

    @abstractmethod
    def input(self) -> Tensor:
        """Random activations; the same each time."""

    @abstractmethod
    def dense_paths(self, x: Tensor) -> dict[str, Call]:
        """The dense ways to compute the layer for x; "torch" is one of them."""

    @abstractmethod
    def sparse(self, x: Tensor) -> Call:
        """The sparse way."""

    @property
    @abstractmethod
    def sizes(self) -> str:
        """All numbers that a time depends on."""

    @property
    @abstractmethod
    def op(self) -> str:
        """What the native library runs: "matmul" or "conv2d"."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """m of that: tokens or pixels."""

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs; "" when none can."""
        return kernel_for(self.packed, self.rows, self.op)

    @property
    def key(self) -> str:
        """What tells this workload from any other on the same machine."""
        packed = self.packed
        parts = [
            self.sizes,
            f"{packed.pattern} {packed.format} {str(packed.dtype).removeprefix('torch.')}",
            f"bias={self.bias is not None} activation={self.activation}",
            f"threads={torch.get_num_threads()}",
            # Another one may be preferred since (see `sparsekit.tune`).
            f"kernel={self.kernel}",
        ]
        return " ".join(parts)

    def _random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*shape, generator=generator)
        return x.to(self.packed.device, self.packed.dtype)


def kernel_for(packed: PackedWeight, m: int, op: str | None = None) -> str:
    """Name of the kernel that runs `m` rows on a packed weight; "" when none can."""
    chosen = explain(packed, m=m, op=op).chosen
    return chosen.kernel if chosen else ""


@dataclass(frozen=True)
class LinearWorkload(Workload):
    """A linear layer for `m` rows of x.

    Args:
        packed: a matrix `[n, k]`.
        m: at least 1.
        bias: `[n]` or None.
        activation: as in `sparsekit.linear`.
    """

    packed: PackedWeight
    m: int
    bias: Tensor | None = None
    activation: str | None = None

    op = "matmul"

    @property
    def rows(self) -> int:
        return self.m

    @property
    def sizes(self) -> str:
        n, k = self.packed.matrix_shape
        return f"m={self.m} n={n} k={k}"

    def input(self) -> Tensor:
        return self._random(self.m, self.packed.matrix_shape[1])

    def dense_paths(self, x: Tensor) -> dict[str, Call]:
        return dense_paths(self.packed.to_dense(), self.bias, self.activation, x)

    def sparse(self, x: Tensor) -> Call:
        return lambda: linear(x, self.packed, self.bias, self.activation)


@dataclass(frozen=True)
class ConvWorkload(Workload):
    """A convolution for images of one size.

    Where x comes in NCHW, converting it is part of every path that needs it in another format, the
    sparse one included. Where it comes in `channels_last`, torch's NCHW operation gets x in NCHW
    for nothing: the dense model would have had it so.

    Args:
        packed: filters.
        size: of x: `(N, C, H, W)`, of a 1-D convolution `(N, C, L)`; no number is 0.
        stride: as in `sparsekit.conv2d`.
        padding: as in `sparsekit.conv2d`. A layer that pads with anything but zeros does so before
            it; measure it for the padded size.
        dilation: as in `sparsekit.conv2d`.
        bias: `[Cout]` or None.
        activation: as in `sparsekit.conv2d`.
        channels_last: whether the channels of x lie side by side.
    """

    packed: PackedWeight
    size: tuple[int, ...]
    stride: Pair = 1
    padding: Padding = 0
    dilation: Pair = 1
    bias: Tensor | None = None
    activation: str | None = None
    channels_last: bool = True

    @property
    def _filters(self) -> FilterShape:
        filters = self.packed.meta.filters
        assert filters is not None
        return filters

    @property
    def op(self) -> str:
        stride, padding, _ = conv_geometry(self._filters, self.stride, self.padding, self.dilation)
        plain = self._filters.taps == 1 and stride == (1, 1) and not any(padding)
        return "matmul" if plain else "conv2d"

    @property
    def rows(self) -> int:
        geometry = conv_geometry(self._filters, self.stride, self.padding, self.dilation)
        height, width = conv2d_size(self._image(), self._filters.kernel_size, *geometry)
        return self.size[0] * height * width

    def _image(self) -> tuple[int, int]:
        return (1, self.size[2]) if self._filters.dims == 1 else (self.size[2], self.size[3])

    @property
    def sizes(self) -> str:
        stride, padding, dilation = conv_geometry(
            self._filters, self.stride, self.padding, self.dilation
        )
        named = {
            "x": self.size,
            "weight": self.packed.shape,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
        }
        numbers = " ".join(f"{name}={'x'.join(map(str, n))}" for name, n in named.items())
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{numbers} groups={self._filters.groups} {layout}"

    def input(self) -> Tensor:
        if not self.channels_last:
            return self._random(*self.size)
        batch, channels, *image = self.size
        return self._random(batch, *image, channels).movedim(-1, 1)

    def sparse(self, x: Tensor) -> Call:
        op = conv1d if self._filters.dims == 1 else conv2d
        return lambda: op(
            x,
            self.packed,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self._filters.groups,
            self.activation,
        )

    def dense_paths(self, x: Tensor) -> dict[str, Call]:
        filters, bias, activation = self._filters, self.bias, self.activation
        weight = self.packed.to_dense()
        if filters.dims == 1:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = map(
            list, conv_geometry(filters, self.stride, self.padding, self.dilation)
        )
        top, left, bottom, right = padding
        uneven = (top, left) != (bottom, right)
        sides = [0, 0] if uneven else [top, left]
        nchw = x.contiguous()
        weight_last = weight.contiguous(memory_format=torch.channels_last)

        def padded(x: Tensor) -> Tensor:
            return functional.pad(x, (left, right, top, bottom)) if uneven else x

        def finished(y: Tensor) -> Tensor:
            return y.squeeze(2) if filters.dims == 1 else y

        def torch_path(x: Tensor, weight: Tensor) -> Call:
            def call() -> Tensor:
                y = functional.conv2d(
                    padded(x), weight, bias, stride, sides, dilation, filters.groups
                )
                return finished(activate(y, activation))

            return call

        def onednn() -> Call:
            ops = torch.ops.mkldnn
            attribute, numbers, algorithm = _ONEDNN_ACTIVATION[activation]
            geometry = (sides, stride, dilation, filters.groups)
            packed = ops._reorder_convolution_weight(weight, *geometry, list(padded(x).shape))

            def call() -> Tensor:
                y = ops._convolution_pointwise(
                    padded(x), packed, bias, *geometry, attribute, numbers, algorithm
                )
                return finished(y)

            return call

        paths = {
            "torch": torch_path(nchw, weight),
            "torch channels_last": torch_path(x, weight_last),
        }
        return _with_onednn(paths, weight, onednn)
