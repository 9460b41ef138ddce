"""From a dense weight to packed bytes and back.

`pack` prunes (if needed), compresses to the canonical form and lays the bytes out for the best
kernel of the device they are for; 2:4 for a GPU's tensor cores it packs on that GPU, to the same
bytes. `PackedWeight` holds those bytes. What leaves the process (pickle, copy, files) is always the
canonical form, which is laid out again where it arrives; so is a weight that moves between a CPU
and a GPU.

Of a convolution the matrix of its filters is packed (`sparsekit.filters`), each group by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit import _native
from sparsekit.filters import FilterShape, detect_filters, to_filters, to_matrix, to_tiles
from sparsekit.patterns import Pattern, PatternLike, detect_pattern, parse_pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ("auto", "cpu", "cuda", "reference")

_CPU = torch.device("cpu")
# Where the groups of a convolution start in the bytes; kernels on GPUs want 128.
_PART_ALIGNMENT = 128


@dataclass(frozen=True)
class PackedMeta:
    """What packed bytes are: everything about a `PackedWeight` but the bytes.

    Attributes:
        format: name of the byte layout, e.g. `"nm"`.
        pattern: the sparsity pattern.
        dtype: dtype of the values.
        shape: (n, k) of the dense weight, of a convolution's matrix.
        target: what the format was chosen for; used again when the weight is packed anew.
        header: the first bytes of the packed form as integers, so that a call need not read them
            from a GPU; of each group of a convolution, one after the other.
        filters: of a convolution; None for a matrix. Its groups lie one after the other, each in
            the same number of bytes.
    """

    format: str
    pattern: Pattern
    dtype: torch.dtype
    shape: tuple[int, int]
    target: str
    header: tuple[int, ...]
    filters: FilterShape | None = None

    @property
    def groups(self) -> int:
        """Parts that the bytes consist of."""
        return 1 if self.filters is None else self.filters.groups


class PackedWeight:
    """A pruned weight in the byte layout of a kernel: a matrix, or the filters of a convolution.

    Made by `pack`. Pickling and copying keep the canonical form and pack again, so a pickle from
    one machine works on another.

    Args:
        data: uint8 `[nbytes]`, as `sparsekit.pack` makes it.
        meta: what the bytes are.
    """

    __slots__ = ("data", "meta")

    def __init__(self, data: Tensor, meta: PackedMeta) -> None:
        self.data = data
        self.meta = meta

    @classmethod
    def from_canonical(
        cls,
        canonical: _native.Canonical,
        target: str = "auto",
        device: torch.device | str = _CPU,
        filters: FilterShape | None = None,
    ) -> PackedWeight:
        """Lay a canonical weight out for `target` (see `pack`), with the bytes on `device`.

        Args:
            filters: the weight is the matrix of these.

        Raises:
            ValueError: it is not.
        """
        device = torch.device(device)
        pattern, dtype, shape = canonical.pattern, canonical.dtype, canonical.shape
        if filters is not None and filters.matrix_shape(pattern) != shape:
            raise ValueError(
                f"PackedWeight: {filters} makes a matrix {list(filters.matrix_shape(pattern))}, "
                f"the canonical weight is {list(shape)}"
            )
        format = _format(pattern, dtype, target, device, filters)
        groups = 1 if filters is None else filters.groups
        parts = [_native.pack(part, format) for part in _split(canonical, groups)]
        header = tuple(number for part in parts for number in _native.packed_header(part))
        meta = PackedMeta(format, pattern, dtype, shape, target, header, filters)
        return cls(_side_by_side(parts).to(device), meta)

    @property
    def format(self) -> str:
        """Name of the byte layout."""
        return self.meta.format

    @property
    def pattern(self) -> Pattern:
        """The sparsity pattern."""
        return self.meta.pattern

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the values."""
        return self.meta.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight: (out_features, in_features), or that of a convolution's filters."""
        filters = self.meta.filters
        return self.meta.shape if filters is None else filters.weight_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(n, k) of the matrix; see `sparsekit.filters` for that of a convolution."""
        return self.meta.shape

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form, padding and header included."""
        return self.data.numel()

    def canonical(self) -> _native.Canonical:
        """The canonical form (values, indices), which files hold: of the whole matrix."""
        canonical = unpacked(self.data.cpu(), self.meta.groups)
        # Bytes do not say which sparsity was asked for; the pattern does.
        return dataclasses.replace(canonical, pattern=self.pattern)

    def to_dense(self) -> Tensor:
        """The dense weight of `shape`, pruned values zero, through the layout's own inverse."""
        if self.data.is_cuda and self.format == _native.CUDA_FORMAT:
            matrix = self._unpacked_on_gpu()
        else:
            matrix = _native.decompress(self.canonical()).to(self.device)
        filters = self.meta.filters
        return matrix if filters is None else to_filters(matrix, filters)

    def _unpacked_on_gpu(self) -> Tensor:
        groups, (n, k), header = self.meta.groups, self.matrix_shape, self.meta.header
        step = len(header) // groups
        parts = [
            _native.unpack_cuda(
                part, header[i * step : (i + 1) * step], (n // groups, k), self.dtype
            )
            for i, part in enumerate(self.data.view(groups, -1))
        ]
        return parts[0] if groups == 1 else torch.cat(parts)

    def to(
        self, target: torch.device | torch.dtype | str, dtype: torch.dtype | None = None
    ) -> PackedWeight:
        """Move to a device, convert the values to another dtype, or both.

        A weight packed with target "auto" is laid out anew where the device wants another format.

        Args:
            target: the device, or the dtype alone.
            dtype: of the values there; None keeps it.

        Raises:
            ValueError: the dtype cannot be stored, or a value overflows in it.
            NotImplementedError: no kernel on a GPU takes the weight.
        """
        if isinstance(target, torch.dtype):
            device, dtype = self.device, target
        else:
            device, dtype = torch.device(target), dtype or self.dtype
        _check_dtype(dtype)
        filters = self.meta.filters
        format = _format(self.pattern, dtype, self.meta.target, device, filters)
        if dtype == self.dtype and format == self.format:
            data = self.data.to(device)
            return self if data is self.data else PackedWeight(data, self.meta)
        canonical = self.canonical()
        if dtype != self.dtype:
            canonical = _converted(canonical, dtype)
        return PackedWeight.from_canonical(canonical, self.meta.target, device, filters)

    def __reduce__(self) -> tuple[Any, ...]:
        meta = self.meta
        return _restore, (self.canonical(), meta.target, str(self.device), meta.filters)

    def __repr__(self) -> str:
        return (
            f"PackedWeight({list(self.shape)}, pattern={self.pattern}, dtype={self.dtype}, "
            f"format={self.format!r}, nbytes={self.nbytes})"
        )


def _restore(
    canonical: _native.Canonical, target: str, device: str, filters: FilterShape | None = None
) -> PackedWeight:
    return PackedWeight.from_canonical(canonical, target, device, filters)


def _format(
    pattern: Pattern,
    dtype: torch.dtype,
    target: str,
    device: torch.device,
    filters: FilterShape | None,
) -> str:
    """The format that `target` means for bytes on a device."""
    if target not in TARGETS:
        raise ValueError(f"pack: target must be one of {TARGETS}, got {target!r}")
    if target == "auto" and device.type == "cuda":
        target = _native.target_of(device)
    op = "matmul" if filters is None else "conv2d"
    return _native.default_format(pattern, dtype, target, op)


def _split(canonical: _native.Canonical, groups: int) -> list[_native.Canonical]:
    """The rows of each group of a convolution."""
    if groups == 1:
        return [canonical]
    rows, k = canonical.shape[0] // groups, canonical.shape[1]
    parts = []
    for group in range(groups):
        tiles = _tiles(canonical.pattern, rows, group)
        if canonical.crow_indices is None:
            values = canonical.values[group * rows : (group + 1) * rows]
            indices, crow = canonical.indices[tiles], None
        else:
            crow = canonical.crow_indices[tiles.start : tiles.stop + 1]
            blocks = slice(int(crow[0]), int(crow[-1]))
            values, indices = canonical.values[blocks], canonical.indices[blocks]
            crow = crow - crow[0]
        parts.append(
            _native.Canonical(canonical.pattern, (rows, k), canonical.dtype, values, indices, crow)
        )
    return parts


def _tiles(pattern: Pattern, rows: int, group: int) -> slice:
    """Which of the matrix's vectors or block rows are those of a group of so many rows."""
    tiles = rows // pattern.row_tile
    return slice(group * tiles, (group + 1) * tiles)


def _joined(parts: Sequence[_native.Canonical]) -> _native.Canonical:
    """The inverse of `_split`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    crow = None
    if first.crow_indices is not None:
        counts = torch.cat([part.crow_indices.diff() for part in parts])  # type: ignore[union-attr]
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    return _native.Canonical(
        first.pattern,
        (first.shape[0] * len(parts), first.shape[1]),
        first.dtype,
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        crow,
    )


def unpacked(data: Tensor, groups: int = 1) -> _native.Canonical:
    """The canonical form of packed bytes on the CPU; of blocks with the sparsity that they have."""
    canonical = _joined([_native.unpack(part) for part in data.view(groups, -1)])
    if canonical.crow_indices is None:
        return canonical
    code = _native.encode_pattern(canonical.pattern)
    pattern = _native.decode_pattern(code, canonical.shape, len(canonical.indices))
    return dataclasses.replace(canonical, pattern=pattern)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """The bytes of all groups, each padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.numel() for part in parts)
    longest += -longest % _PART_ALIGNMENT
    data = parts[0].new_zeros(len(parts), longest)
    for row, part in zip(data, parts, strict=True):
        row[: part.numel()] = part
    return data.view(-1)


def _converted(canonical: _native.Canonical, dtype: torch.dtype) -> _native.Canonical:
    values = canonical.values.to(dtype)
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"PackedWeight.to: a value overflows in {dtype}; the largest magnitude is "
            f"{canonical.values.abs().max().item():g}"
        )
    return dataclasses.replace(canonical, values=values, dtype=dtype)


def pack(
    weight: Tensor,
    pattern: PatternLike = "2:4",
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    target: str = "auto",
    groups: int = 1,
) -> PackedWeight:
    """Prune a dense weight to a pattern and pack it for a kernel.

    A weight whose non-zeros already fit the pattern packs without change; another one keeps its
    largest magnitudes (`sparsekit.mask`).

    Args:
        weight: `[n, k]`, or the filters of a convolution, `[Cout, Cin / groups, length]` or
            `[Cout, Cin / groups, height, width]`, whose sparsity runs along Cin
            (`sparsekit.filters`); float32, bfloat16 or float16 (others with `dtype`).
        pattern: a `Pattern` or its spelling.
        mask: bool, of the weight's shape, True = kept; overrides the choice by magnitude.
        dtype: dtype of the packed values; None keeps the weight's.
        target: "auto" for the best format on the device where the bytes are, also when they move
            to another one; "cpu" for this CPU wherever they are; "cuda" for a GPU (on a machine
            without one: for compute capability 8.0); "reference" for the canonical layout that the
            scalar kernels read.
        groups: of the convolution.

    Returns:
        The packed weight, on the weight's device.

    Raises:
        ValueError: the weight is empty, of another shape or dtype, or holds a NaN or infinity; the
            mask has another shape or dtype or does not fit the pattern; the groups do not fit the
            weight or the pattern, or have one input channel each (a depthwise convolution).
        NotImplementedError: no kernel on a GPU takes the pattern in this dtype.
    """
    pattern = parse_pattern(pattern)
    weight = checked_weight("pack", weight, _DIMS)
    filters = _filters(weight, pattern, groups)
    if mask is not None:
        _check_user_mask(mask, weight)
    dtype = weight.dtype if dtype is None else dtype
    _check_dtype(dtype)
    if filters is not None:
        weight = to_matrix(weight, pattern)
        mask = None if mask is None else to_matrix(mask, pattern)
    if mask is not None:
        _check_fit(mask, pattern)
    converted = weight.to(dtype)
    if dtype != weight.dtype:
        _check_finite(f"pack: after conversion to {dtype}", converted)
    if (
        weight.is_cuda
        and _format(pattern, dtype, target, weight.device, filters) == _native.CUDA_FORMAT
    ):
        return _pack_on_gpu(weight, converted, pattern, mask, target, filters)
    mask = _chosen_mask(weight, pattern, filters) if mask is None else mask
    canonical = _native.compress(converted.cpu(), mask.cpu(), pattern)
    return PackedWeight.from_canonical(canonical, target, weight.device, filters)


def _filters(weight: Tensor, pattern: Pattern, groups: int) -> FilterShape | None:
    """What the weight is, with groups that fit it."""
    if weight.dim() == 2:
        if groups != 1:
            raise ValueError(f"pack: a matrix has no groups, got groups={groups}")
        return None
    filters = FilterShape.of(weight, groups)
    if groups > 1 and filters.in_channels == 1:
        raise ValueError(
            "pack: a depthwise convolution (one input channel in each group) has nothing to skip; "
            "leave it dense"
        )
    filters.matrix_shape(pattern)
    return filters


def _chosen_mask(matrix: Tensor, pattern: Pattern, filters: FilterShape | None) -> Tensor:
    if filters is not None:
        matrix = to_tiles(to_filters(matrix, filters), pattern)
    mask = matrix != 0
    if not pattern.fits(mask):
        mask = pattern.mask(matrix.abs())
    return mask if filters is None else to_matrix(to_filters(mask, filters), pattern)


def _pack_on_gpu(
    weight: Tensor,
    converted: Tensor,
    pattern: Pattern,
    mask: Tensor | None,
    target: str,
    filters: FilterShape | None = None,
) -> PackedWeight:
    """2:4 where it is. `converted` is the weight in the dtype of the values."""
    # The kernel chooses row by row, among the values it packs.
    if mask is None and (pattern.row_tile > 1 or converted.dtype != weight.dtype):
        mask = _chosen_mask(weight, pattern, filters)
    mask = None if mask is None else mask.to(weight.device)
    groups = 1 if filters is None else filters.groups
    masks = [None] * groups if mask is None else mask.chunk(groups)
    parts, headers = zip(
        *(
            _native.pack_cuda(rows, kept, pattern)
            for rows, kept in zip(converted.chunk(groups), masks, strict=True)
        ),
        strict=True,
    )
    shape = (weight.shape[0], weight.shape[1])
    header = tuple(number for header in headers for number in header)
    meta = PackedMeta(_native.CUDA_FORMAT, pattern, converted.dtype, shape, target, header, filters)
    return PackedWeight(_side_by_side(parts), meta)


def mask(weight: Tensor, pattern: PatternLike) -> Tensor:
    """The mask of a pattern by magnitude.

    Args:
        weight: `[n, k]`, or the filters of a convolution as for `pack`; any floating dtype, finite.
        pattern: a `Pattern` or its spelling.

    Returns:
        bool, of the weight's shape, True = kept.
    """
    pattern = parse_pattern(pattern)
    magnitude = checked_weight("mask", weight, _DIMS).abs()
    if magnitude.dim() == 2:
        return pattern.mask(magnitude)
    return to_filters(pattern.mask(to_tiles(magnitude, pattern)), FilterShape.of(magnitude))


def detect(weight: Tensor) -> Pattern | None:
    """Which pattern the zeros of a weight already follow, e.g. of a model pruned elsewhere.

    Args:
        weight: `[n, k]`, or the filters of a convolution as for `pack`; any floating dtype.

    Returns:
        The most structured pattern that fits (see `sparsekit.patterns.detect_pattern`), or None
        for a dense weight and for zeros without structure.
    """
    weight = checked_weight("detect", weight, _DIMS)
    return detect_pattern(weight) if weight.dim() == 2 else detect_filters(weight)


_DIMS = (2, 3, 4)
_SHAPES = {
    2: "[n, k]",
    3: "[Cout, Cin, length]",
    4: "[Cout, Cin, height, width]",
}


def checked_weight(what: str, weight: Tensor, dims: Sequence[int] = (2,)) -> Tensor:
    """A weight that is floating-point, not empty and finite, detached.

    Args:
        what: who asks; begins the message.
        weight: of as many dimensions as one of `dims`.
        dims: 2 for a matrix, 3 and 4 for filters.

    Raises:
        ValueError: it is not; a value that is not finite is named with its place.
    """
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        got = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{what}: expected a dense tensor as the weight, got {got}")
    if weight.dim() not in dims:
        shapes = " or ".join(_SHAPES[dim] for dim in dims)
        raise ValueError(f"{what}: expected a weight of shape {shapes}, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"{what}: expected a floating-point weight, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{what}: the weight is empty, its shape is {list(weight.shape)}")
    weight = weight.detach()
    _check_finite(what, weight)
    return weight


def _check_finite(what: str, weight: Tensor) -> None:
    # A sum is non-finite if any value is; it may also overflow, so it only opens the closer look.
    if bool(weight.sum(dtype=torch.float32).isfinite()):
        return
    bad = ~weight.isfinite()
    if not bool(bad.any()):
        return
    place = bad.flatten().to(torch.uint8).argmax()
    first = [int(i) for i in torch.unravel_index(place, weight.shape)]
    where = f"row {first[0]}, column {first[1]}" if len(first) == 2 else str(first)
    raise ValueError(
        f"{what}: the weight is {weight[tuple(first)].item()} at {where} "
        f"({int(bad.sum())} such values); expected finite values"
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"pack: values can be float32, bfloat16 or float16, got {dtype}; "
            "choose one of these with dtype="
        )


def _check_user_mask(mask: Tensor, weight: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"pack: expected a bool mask (True = kept), got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"pack: the mask has shape {list(mask.shape)}, the weight {list(weight.shape)}"
        )


def _check_fit(mask: Tensor, pattern: Pattern) -> None:
    violation = pattern.first_violation(mask)
    if violation is not None:
        raise ValueError(
            f"pack: the mask does not fit {pattern}: {violation}; make it with sparsekit.mask"
        )
