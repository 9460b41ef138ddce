"""One measured case: a layer with a pattern, our kernel, checked, and every baseline beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekit as sk
from bench.baselines import BASELINES, Unavailable
from bench.shapes import SHAPES, Shape
from sparsekit import _native, testing

PATTERNS = ("2:4", "2:4v4", "2:4v16", "bsr16x16@0.75", "bsr16x16@0.9")
DTYPES = (torch.float32, torch.bfloat16)

# Where kernels that the package would not choose are measured too.
KERNEL_SHAPE = next(shape for shape in SHAPES if shape.name == "reference.wide")


@dataclass(frozen=True)
class Case:
    """What to measure. `kernel` None lets the package choose."""

    shape: Shape
    m: int
    pattern: str
    dtype: torch.dtype
    kernel: _native.KernelInfo | None = None

    @property
    def name(self) -> str:
        dtype = _native.DTYPE_NAMES[self.dtype]
        forced = f"-{self.kernel.name}" if self.kernel else ""
        return f"{self.shape.name}-m{self.m}-{self.pattern}-{dtype}{forced}"


def chosen_cases(shapes: tuple[Shape, ...] = SHAPES) -> Iterator[Case]:
    """Every shape at each of its batch sizes, with the kernel the package chooses."""
    for shape in shapes:
        for m in shape.rows:
            for dtype in DTYPES:
                for pattern in PATTERNS:
                    yield Case(shape, m, pattern, dtype)


def kernel_cases() -> Iterator[Case]:
    """Every kernel of the registry this machine can run, on one shape, by each pattern it reads."""
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    for kernel in sk.kernels():
        if not kernel.available or dtypes[kernel.dtype] not in DTYPES:
            continue
        for text in PATTERNS:
            pattern = sk.parse_pattern(text)
            if not kernel.format.startswith(pattern.family):
                continue
            n, k, dtype = KERNEL_SHAPE.n, KERNEL_SHAPE.k, dtypes[kernel.dtype]
            for m in KERNEL_SHAPE.rows:
                answers = _native.explain(kernel.format, pattern, dtype, n, k, m)
                if any(answer.kernel == kernel.name and answer.ok for answer in answers):
                    yield Case(KERNEL_SHAPE, m, text, dtype, kernel)


@dataclass(frozen=True)
class Prepared:
    """A case ready to be timed.

    Attributes:
        kernel: Id of the kernel that runs.
        ours: The sparse call.
        dense: Baselines that multiply the dense matrix.
        sparse: Baselines that know of the zeros.
        unavailable: Baselines that cannot run this case, and why.
    """

    kernel: str
    ours: Callable[[], Tensor]
    dense: dict[str, Callable[[], Tensor]]
    sparse: dict[str, Callable[[], Tensor]]
    unavailable: dict[str, str]


def prepare(case: Case, sparse_baselines: bool = True) -> Prepared:
    """Builds every path of a case and checks our result by the package's tolerance rule.

    Args:
        case: What to build.
        sparse_baselines: Also torch's own sparse formats; they can be very slow.

    Raises:
        AssertionError: Our result is wrong.
    """
    shape, m = case.shape, case.m
    pattern = sk.parse_pattern(case.pattern)
    problem = testing.make_problem(m, shape.n, shape.k, pattern, case.dtype)
    x, weight, bias = problem.x, problem.weight, problem.bias
    if case.kernel is None:
        packed = sk.pack(weight, pattern=pattern, mask=problem.mask)
        answers = _native.explain(packed.format, pattern, case.dtype, shape.n, shape.k, m)
        kernel = next(answer.kernel for answer in answers if answer.chosen)

        def ours() -> Tensor:
            return sk.linear(x, packed, bias)
    else:
        kernel = case.kernel.name
        canonical = _native.compress(weight, problem.mask, pattern)
        data = _native.pack(canonical, case.kernel.format)
        y = torch.empty(m, shape.n, dtype=case.dtype)

        def ours() -> Tensor:
            _native.matmul(x, data, y, bias, kernel=kernel)
            return y

    with torch.inference_mode():
        testing.assert_matmul_close(ours(), x, weight, bias)
    paths: dict[bool, dict[str, Callable[[], Tensor]]] = {True: {}, False: {}}
    unavailable = {}
    for baseline in BASELINES:
        if baseline.dense or sparse_baselines:
            try:
                paths[baseline.dense][baseline.name] = baseline.build(weight, bias, x)
            except Unavailable as reason:
                unavailable[baseline.name] = str(reason)
    return Prepared(kernel, ours, paths[True], paths[False], unavailable)


def machine() -> dict[str, str]:
    """What a figure depends on besides the case."""
    cpu = _native.cpu_info()
    return {"cpu": str(cpu["model"]), "isa": str(cpu["isa"]), "torch": torch.__version__}
