"""The filters of a convolution as the matrix `W[n, k]` that patterns, formats and kernels know.

n are the output channels. k runs over the kernel's positions (taps), row by row, and within each
tap over the input channels of a group, padded with zeros to `tap` columns: column
`(r * width + s) * tap + c` is `filters[:, c, r, s]`. Sparsity therefore runs along the input
channels, and no group of N:M and no block straddles two taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.patterns import Pattern, detect_pattern

# Channels that a kernel loads at once: on a GPU 16 bytes.
_CHANNELS = 8
# The widest block that is looked for.
_WIDEST = 64


@dataclass(frozen=True)
class FilterShape:
    """The sizes of a convolution's filters.

    Args:
        out_channels: of all groups together.
        in_channels: of one group.
        kernel_size: (height, width); of a 1-D convolution (1, length).
        groups: of the convolution.
        dims: 1 or 2, of the convolution.

    Raises:
        ValueError: sizes that no convolution has.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, int]
    groups: int = 1
    dims: int = 2

    def __post_init__(self) -> None:
        numbers = (self.out_channels, self.in_channels, *self.kernel_size, self.groups)
        if len(self.kernel_size) != 2 or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError(f"filters: expected sizes of at least 1, got {self}")
        if self.dims not in (1, 2) or (self.dims == 1 and self.kernel_size[0] != 1):
            raise ValueError(
                f"filters: expected 2 dimensions, or 1 and a kernel of height 1, got {self}"
            )
        if self.out_channels % self.groups:
            raise ValueError(
                f"filters: {self.out_channels} output channels are no multiple of "
                f"groups={self.groups}"
            )

    @classmethod
    def of(cls, filters: Tensor, groups: int = 1) -> FilterShape:
        """The shape of `[Cout, Cin / groups, length]` or `[Cout, Cin / groups, height, width]`."""
        if filters.dim() not in (3, 4):
            raise ValueError(
                "filters: expected the weight of a convolution, [Cout, Cin, length] or "
                f"[Cout, Cin, height, width], got {list(filters.shape)}"
            )
        rows, channels, *kernel = filters.shape
        height, width = kernel if len(kernel) == 2 else (1, *kernel)
        return cls(rows, channels, (height, width), groups, len(kernel))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight in torch."""
        kernel = self.kernel_size[2 - self.dims :]
        return (self.out_channels, self.in_channels, *kernel)

    @property
    def op(self) -> str:
        """The function that takes them: conv1d or conv2d."""
        return "conv1d" if self.dims == 1 else "conv2d"

    @property
    def channels(self) -> int:
        """Input channels of all groups together."""
        return self.in_channels * self.groups

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel_size[0] * self.kernel_size[1]

    def tap(self, pattern: Pattern) -> int:
        """Columns of one tap: the channels, padded where there is more than one tap."""
        if self.taps == 1:
            return self.in_channels
        unit = math.lcm(_CHANNELS, pattern.k_tile)
        return -(-self.in_channels // unit) * unit

    def matrix_shape(self, pattern: Pattern) -> tuple[int, int]:
        """(n, k) of the matrix.

        Raises:
            ValueError: rows that the pattern decides together would belong to two groups.
        """
        rows = self.out_channels // self.groups
        if self.groups > 1 and rows % pattern.row_tile:
            raise ValueError(
                f"filters: {pattern} decides {pattern.row_tile} rows together, a group has {rows} "
                f"output channels; choose a pattern whose rows divide {rows}"
            )
        return self.out_channels, self.taps * self.tap(pattern)


def to_matrix(filters: Tensor, pattern: Pattern) -> Tensor:
    """The matrix of filters, or of a score or mask of their shape.

    Args:
        filters: `[Cout, Cin / groups, length]` or `[Cout, Cin / groups, height, width]`.
        pattern: decides how far each tap is padded.

    Returns:
        `[n, k]`; zero, or False, in the padding.
    """
    return _to_matrix(filters, FilterShape.of(filters).tap(pattern))


def _to_matrix(filters: Tensor, tap: int) -> Tensor:
    rows, channels = filters.shape[:2]
    last = filters.reshape(rows, channels, -1).transpose(1, 2)
    if tap > channels:
        last = functional.pad(last, (0, tap - channels))
    return last.reshape(rows, -1)


def to_filters(matrix: Tensor, shape: FilterShape) -> Tensor:
    """The inverse of `to_matrix`: contiguous, of `shape.weight_shape`; the padding is dropped.

    Args:
        matrix: `[n, k]`, of any dtype.
        shape: of the filters.

    Raises:
        ValueError: the matrix is not of such filters.
    """
    rows, columns = matrix.shape
    if (
        rows != shape.out_channels
        or columns % shape.taps
        or columns < shape.taps * shape.in_channels
    ):
        raise ValueError(f"filters: a matrix {list(matrix.shape)} does not hold {shape}")
    last = matrix.reshape(rows, shape.taps, -1)[:, :, : shape.in_channels]
    return last.transpose(1, 2).reshape(shape.weight_shape).contiguous()


def to_tiles(filters: Tensor, pattern: Pattern) -> Tensor:
    """`to_matrix` with taps that are filled up to whole tiles of the pattern and no further.

    Masks are chosen and judged on it: blocks of nothing but padding would count among those that a
    sparsity keeps.
    """
    shape = FilterShape.of(filters)
    tile = pattern.k_tile if shape.taps > 1 else 1
    return _to_matrix(filters, -(-shape.in_channels // tile) * tile)


def detect_filters(filters: Tensor) -> Pattern | None:
    """`detect_pattern` of a convolution's filters."""
    shape = FilterShape.of(filters)
    channels = shape.in_channels
    if shape.taps == 1:
        return detect_pattern(_to_matrix(filters, channels))
    # What fits taps of this many columns is what fits those of its own: no tile straddles two, and
    # none is wider than the channels.
    widest = min(_WIDEST, 1 << (channels.bit_length() - 1))
    tap = -(-channels // widest) * widest
    columns = torch.arange(tap, device=filters.device) < channels
    return detect_pattern(_to_matrix(filters, tap), columns.repeat(shape.taps), widest)
