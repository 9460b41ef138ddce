"""The kernels of the registry for GPUs, each with the patterns that its format holds."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from kernel_cases import holds
from torch import Tensor

from sparsekit import _native, _ops, parse_pattern
from sparsekit._native import KernelInfo
from sparsekit.testing import Problem, make_problem

PATTERNS = (
    "2:4",
    "2:4v4",
    "2:4v16",
    "1:4",
    "3:4",
    "4:8",
    "8:16v4",
    "bsr1x1@0.5",
    "bsr5x3@0.5",
    "bsr16x16@0.75",
    "bsr32x32@0.75",
    "bsr64x64@0.5",
)
DTYPES = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
ACTIVATIONS = _ops.ACTIVATIONS
GPU = torch.device("cuda:0")

KERNELS = [
    kernel for kernel in _native.kernels() if kernel.device == "cuda" and kernel.op == "matmul"
]


CASES = [
    (kernel, pattern)
    for kernel, pattern in itertools.product(KERNELS, PATTERNS)
    if holds(kernel.format, pattern, DTYPES[kernel.dtype])
]
each_case = pytest.mark.parametrize(
    ("kernel", "pattern"), CASES, ids=[f"{kernel.name}-{pattern}" for kernel, pattern in CASES]
)
# One for each format and dtype, in the order of the registry, with a pattern that is packed in this
# format for a GPU.
MAIN = list(
    {
        (kernel.format, kernel.dtype): (kernel, pattern)
        for kernel, pattern in reversed(CASES)
        if _native.default_format(parse_pattern(pattern), DTYPES[kernel.dtype], "cuda")
        == kernel.format
    }.values()
)
each_format = pytest.mark.parametrize(
    ("kernel", "pattern"), MAIN, ids=[f"{kernel.name}-{pattern}" for kernel, pattern in MAIN]
)


def accepts(kernel: KernelInfo, pattern: str, m: int, n: int, k: int) -> bool:
    dtype = DTYPES[kernel.dtype]
    parsed = parse_pattern(pattern)
    candidates = _native.explain(kernel.format, parsed, dtype, n, k, m, GPU)
    return any(candidate.kernel == kernel.name and candidate.ok for candidate in candidates)


# Kernels of one format share their problems, which take longer to make than to solve.
_make_problem = functools.lru_cache(maxsize=1024)(make_problem)


def problem_on_gpu(
    kernel: KernelInfo, pattern: str, m: int, n: int, k: int, integers: bool = True, seed: int = 0
) -> Problem:
    """Not to be written to."""
    return _make_problem(m, n, k, pattern, DTYPES[kernel.dtype], integers, seed, GPU)


def pack_for(kernel: KernelInfo, pattern: str, problem: Problem) -> tuple[Tensor, tuple[int, ...]]:
    """The weight in the kernel's format, on the GPU, and its header."""
    return _pack(kernel.format, pattern, problem.weight, problem.mask)


@functools.lru_cache(maxsize=1024)
def _pack(
    format: str, pattern: str, weight: Tensor, mask: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    canonical = _native.compress(weight.cpu(), mask.cpu(), parse_pattern(pattern))
    data = _native.pack(canonical, format)
    return data.to(GPU), _native.packed_header(data)
