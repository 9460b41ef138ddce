"""What can run here, and why: the kernel registry made readable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsekit import _native
from sparsekit._native import Candidate, KernelInfo
from sparsekit.pack import PackedWeight
from sparsekit.patterns import Pattern, PatternLike, parse_pattern


class KernelTable(tuple[KernelInfo, ...]):
    """All kernels of this build; `str()` is a table with the reason for each that cannot run."""

    def __str__(self) -> str:
        rows = [
            (kernel.name, "yes" if kernel.available else "no", kernel.reason) for kernel in self
        ]
        return table(("kernel", "runs here", "reason"), rows)


@dataclass(frozen=True)
class Explanation:
    """Every kernel's answer to one problem.

    Attributes:
        pattern: the weight's pattern.
        format: its byte layout.
        dtype: of the weight and the activations.
        m: rows of x.
        n: out_features.
        k: in_features.
        candidates: all kernels of the registry; at most one is `chosen`.
    """

    pattern: Pattern
    format: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The kernel that will run, or None when none can."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)

    def __str__(self) -> str:
        # The choice first, then what could run, then what could not.
        order = sorted(self.candidates, key=lambda c: (not c.chosen, not c.ok))
        rows = [
            (
                candidate.kernel,
                "chosen" if candidate.chosen else "can run" if candidate.ok else "cannot run",
                "" if candidate.cost_us is None else f"{candidate.cost_us:.1f}",
                candidate.reason,
            )
            for candidate in order
        ]
        head = (
            f"matmul m={self.m} n={self.n} k={self.k}, {self.pattern} in format {self.format!r}, "
            f"{self.dtype}"
        )
        return f"{head}\n{table(('kernel', 'verdict', 'estimated µs', 'reason'), rows)}"


def kernels() -> KernelTable:
    """All kernels of this build, and for each whether this machine can run it and why not."""
    return KernelTable(_native.kernels())


def explain(
    weight: PackedWeight | PatternLike,
    *,
    m: int,
    n: int | None = None,
    k: int | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Why which kernel runs a problem, and why the others do not.

    Args:
        weight: a packed weight, or a pattern with `n` and `k` for one that `pack` would make here.
        m: rows of x (tokens, pixels).
        n: out_features; taken from a packed weight.
        k: in_features; taken from a packed weight.
        dtype: of weight and activations; taken from a packed weight, else float32.

    Raises:
        ValueError: n or k is missing, or contradicts the packed weight.
    """
    if isinstance(weight, PackedWeight):
        own = (*weight.shape, weight.dtype)
        for name, asked, has in zip(("n", "k", "dtype"), (n, k, dtype), own, strict=True):
            if asked is not None and asked != has:
                raise ValueError(f"explain: {name}={asked}, the packed weight has {name}={has}")
        pattern, format = weight.pattern, weight.format
        (n, k), dtype = weight.shape, weight.dtype
    else:
        if n is None or k is None:
            raise ValueError("explain: a pattern alone has no size; pass n= and k=, or a weight")
        pattern = parse_pattern(weight)
        dtype = torch.float32 if dtype is None else dtype
        format = _native.default_format(pattern, dtype)
    if m < 0 or n < 1 or k < 1:
        raise ValueError(f"explain: expected m >= 0, n >= 1 and k >= 1, got m={m}, n={n}, k={k}")
    candidates = tuple(_native.explain(format, pattern, dtype, n, k, m))
    return Explanation(pattern, format, dtype, m, n, k, candidates)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns as plain text, two spaces apart."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
