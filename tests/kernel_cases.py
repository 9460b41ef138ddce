"""The kernels of the registry that this CPU can run, each with the patterns that it takes."""

from __future__ import annotations

import functools
import itertools

import torch

from sparsekit import _native, parse_pattern
from sparsekit._native import KernelInfo
from sparsekit.testing import make_problem

PATTERNS = (
    "1:4",
    "2:4",
    "4:8",
    "2:4v4",
    "4:8v8",
    "2:4v16",
    "bsr1x4@0.5",
    "bsr4x1@0.5",
    "bsr16x1@0.75",
    "bsr16x16@0.75",
    "bsr64x64@0.5",
)
DTYPES = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
ACTIVATIONS = tuple(_native.ACTIVATIONS)


@functools.cache
def holds(format: str, pattern: str, dtype: torch.dtype) -> bool:
    """Whether a format can store a pattern."""
    problem = make_problem(1, 64, 128, pattern, dtype)
    canonical = _native.compress(problem.weight, problem.mask, parse_pattern(pattern))
    try:
        _native.pack(canonical, format)
    except ValueError:
        return False
    return True


def accepts(kernel: KernelInfo, pattern: str, m: int, n: int = 64, k: int = 128) -> bool:
    """Whether a kernel takes a problem of its own format and dtype."""
    dtype = DTYPES[kernel.dtype]
    if not holds(kernel.format, pattern, dtype):
        return False
    candidates = _native.explain(
        kernel.format, parse_pattern(pattern), dtype, n, k, m, op=kernel.op
    )
    return any(candidate.kernel == kernel.name and candidate.ok for candidate in candidates)


def available(op: str) -> list[KernelInfo]:
    """The kernels of an operation."""
    return [
        info
        for info in _native.kernels()
        if info.available and info.op == op and info.device == "cpu"
    ]


def cases(op: str) -> list[tuple[KernelInfo, str]]:
    """Each kernel of an operation with each pattern that it takes."""
    return [
        (kernel, pattern)
        for kernel, pattern in itertools.product(available(op), PATTERNS)
        if any(accepts(kernel, pattern, m) for m in (1, 64))
    ]
