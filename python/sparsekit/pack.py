"""From a dense weight to packed bytes and back.

`pack` prunes (if needed), compresses to the canonical form and lays the bytes out for the best
kernel of the device they are for; 2:4 for a GPU's tensor cores it packs on that GPU, to the same
bytes. `PackedWeight` holds those bytes. What leaves the process (pickle, copy, files) is always the
canonical form, which is laid out again where it arrives; so is a weight that moves between a CPU
and a GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit import _native
from sparsekit.patterns import Pattern, PatternLike, detect_pattern, parse_pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ("auto", "cpu", "cuda", "reference")

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PackedMeta:
    """What packed bytes are: everything about a `PackedWeight` but the bytes.

    Attributes:
        format: name of the byte layout, e.g. `"nm"`.
        pattern: the sparsity pattern.
        dtype: dtype of the values.
        shape: (n, k) of the dense weight.
        target: what the format was chosen for; used again when the weight is packed anew.
        header: the first bytes of the packed form as integers, so that a call need not read them
            from a GPU.
    """

    format: str
    pattern: Pattern
    dtype: torch.dtype
    shape: tuple[int, int]
    target: str
    header: tuple[int, ...]


class PackedWeight:
    """A pruned weight `W[n, k]` in the byte layout of a kernel.

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
    ) -> PackedWeight:
        """Lay a canonical weight out for `target` (see `pack`), with the bytes on `device`."""
        device = torch.device(device)
        format = _format(canonical.pattern, canonical.dtype, target, device)
        data = _native.pack(canonical, format)
        meta = PackedMeta(
            format,
            canonical.pattern,
            canonical.dtype,
            canonical.shape,
            target,
            _native.packed_header(data),
        )
        return cls(data.to(device), meta)

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
    def shape(self) -> tuple[int, int]:
        """(n, k): out_features and in_features of the dense weight."""
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
        """The canonical form (values, indices), which files hold."""
        canonical = _native.unpack(self.data.cpu())
        # Bytes do not say which sparsity was asked for; the pattern does.
        return dataclasses.replace(canonical, pattern=self.pattern)

    def to_dense(self) -> Tensor:
        """The dense weight `[n, k]`, pruned values zero, through the layout's own inverse."""
        if self.data.is_cuda and self.format == _native.CUDA_FORMAT:
            return _native.unpack_cuda(self.data, self.meta.header, self.shape, self.dtype)
        return _native.decompress(self.canonical()).to(self.device)

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
        format = _format(self.pattern, dtype, self.meta.target, device)
        if dtype == self.dtype and format == self.format:
            data = self.data.to(device)
            return self if data is self.data else PackedWeight(data, self.meta)
        canonical = self.canonical()
        if dtype != self.dtype:
            canonical = _converted(canonical, dtype)
        return PackedWeight.from_canonical(canonical, self.meta.target, device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.canonical(), self.meta.target, str(self.device))

    def __repr__(self) -> str:
        n, k = self.shape
        return (
            f"PackedWeight([{n}, {k}], pattern={self.pattern}, dtype={self.dtype}, "
            f"format={self.format!r}, nbytes={self.nbytes})"
        )


def _restore(canonical: _native.Canonical, target: str, device: str) -> PackedWeight:
    return PackedWeight.from_canonical(canonical, target, device)


def _format(pattern: Pattern, dtype: torch.dtype, target: str, device: torch.device) -> str:
    """The format that `target` means for bytes on a device."""
    if target not in TARGETS:
        raise ValueError(f"pack: target must be one of {TARGETS}, got {target!r}")
    if target == "auto" and device.type == "cuda":
        target = _native.target_of(device)
    return _native.default_format(pattern, dtype, target)


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
) -> PackedWeight:
    """Prune a dense weight to a pattern and pack it for a kernel.

    A weight whose non-zeros already fit the pattern packs without change; another one keeps its
    largest magnitudes (`sparsekit.mask`).

    Args:
        weight: `[n, k]`, float32, bfloat16 or float16 (others with `dtype`).
        pattern: a `Pattern` or its spelling.
        mask: bool `[n, k]`, True = kept; overrides the choice by magnitude.
        dtype: dtype of the packed values; None keeps the weight's.
        target: "auto" for the best format on the device where the bytes are, also when they move
            to another one; "cpu" for this CPU wherever they are; "cuda" for a GPU (on a machine
            without one: for compute capability 8.0); "reference" for the canonical layout that the
            scalar kernels read.

    Returns:
        The packed weight, on the weight's device.

    Raises:
        ValueError: the weight is empty, not 2-D, of another dtype, or holds a NaN or infinity; the
            mask has another shape or dtype or does not fit the pattern.
        NotImplementedError: no kernel on a GPU takes the pattern in this dtype.
    """
    pattern = parse_pattern(pattern)
    weight = checked_weight("pack", weight)
    if mask is not None:
        _check_user_mask(mask, weight, pattern)
    dtype = weight.dtype if dtype is None else dtype
    _check_dtype(dtype)
    converted = weight.to(dtype)
    if dtype != weight.dtype:
        _check_finite(f"pack: after conversion to {dtype}", converted)
    if weight.is_cuda and _format(pattern, dtype, target, weight.device) == _native.CUDA_FORMAT:
        return _pack_on_gpu(weight, converted, pattern, mask, target)
    mask = _chosen_mask(weight, pattern) if mask is None else mask
    canonical = _native.compress(converted.cpu(), mask.cpu(), pattern)
    return PackedWeight.from_canonical(canonical, target, weight.device)


def _chosen_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    mask = weight != 0
    return mask if pattern.fits(mask) else pattern.mask(weight.abs())


def _pack_on_gpu(
    weight: Tensor, converted: Tensor, pattern: Pattern, mask: Tensor | None, target: str
) -> PackedWeight:
    """2:4 where it is. `converted` is the weight in the dtype of the values."""
    # The kernel chooses row by row, among the values it packs.
    if mask is None and (pattern.row_tile > 1 or converted.dtype != weight.dtype):
        mask = _chosen_mask(weight, pattern)
    mask = None if mask is None else mask.to(weight.device)
    data, header = _native.pack_cuda(converted, mask, pattern)
    shape = (weight.shape[0], weight.shape[1])
    meta = PackedMeta(_native.CUDA_FORMAT, pattern, converted.dtype, shape, target, header)
    return PackedWeight(data, meta)


def mask(weight: Tensor, pattern: PatternLike) -> Tensor:
    """The mask of a pattern by magnitude.

    Args:
        weight: `[n, k]`, any floating dtype, finite.
        pattern: a `Pattern` or its spelling.

    Returns:
        bool `[n, k]`, True = kept.
    """
    return parse_pattern(pattern).mask(checked_weight("mask", weight).abs())


def detect(weight: Tensor) -> Pattern | None:
    """Which pattern the zeros of a weight already follow, e.g. of a model pruned elsewhere.

    Args:
        weight: `[n, k]`, any floating dtype.

    Returns:
        The most structured pattern that fits (see `sparsekit.patterns.detect_pattern`), or None
        for a dense weight and for zeros without structure.
    """
    return detect_pattern(checked_weight("detect", weight))


def checked_weight(what: str, weight: Tensor) -> Tensor:
    """A weight that is 2-D, floating-point, not empty and finite, detached.

    Args:
        what: who asks; begins the message.
        weight: `[n, k]`.

    Raises:
        ValueError: it is not; a value that is not finite is named with its place.
    """
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        got = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{what}: expected a dense tensor as the weight, got {got}")
    if weight.dim() != 2:
        raise ValueError(f"{what}: expected a weight of shape [n, k], got {list(weight.shape)}")
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
    row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), weight.shape[1])
    raise ValueError(
        f"{what}: the weight is {weight[row, column].item()} at row {row}, column {column} "
        f"({int(bad.sum())} such values); expected finite values"
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"pack: values can be float32, bfloat16 or float16, got {dtype}; "
            "choose one of these with dtype="
        )


def _check_user_mask(mask: Tensor, weight: Tensor, pattern: Pattern) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"pack: expected a bool mask (True = kept), got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"pack: the mask has shape {list(mask.shape)}, the weight {list(weight.shape)}"
        )
    violation = pattern.first_violation(mask)
    if violation is not None:
        raise ValueError(
            f"pack: the mask does not fit {pattern}: {violation}; make it with sparsekit.mask"
        )
