"""One measured case: a layer with a pattern, our kernel, checked, and every baseline beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import sparsekit as sk
from bench.baselines import BASELINES, Baseline, Unavailable
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
    """Every kernel of the registry this CPU can run, on one shape, by each pattern it reads."""
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    for kernel in sk.kernels():
        if not kernel.available or kernel.device != "cpu" or dtypes[kernel.dtype] not in DTYPES:
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
class Layer:
    """A random pruned layer, and its packed weight."""

    weight: Tensor
    bias: Tensor
    packed: sk.PackedWeight


# A run goes through the batch sizes and thread counts of a layer before it takes the next.
@lru_cache(maxsize=1)
def random_layer(n: int, k: int, pattern: str, dtype: torch.dtype) -> Layer:
    """A layer whose weight follows a pattern, quick for large ones too."""
    generator = torch.Generator().manual_seed(0)
    parsed = sk.parse_pattern(pattern)
    mask = random_mask(parsed, n, k, generator)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    weight.masked_fill_(~mask, 0)
    bias = torch.randn(n, generator=generator).to(dtype)
    return Layer(weight, bias, sk.pack(weight, parsed, mask))


def random_mask(pattern: sk.Pattern, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Random positions of a pattern, bool `[n, k]`.

    Blocks are chosen without ranking them all, which for single values takes many seconds; of
    equal scores at the border none is kept.
    """
    if not isinstance(pattern, sk.BlockSparse):
        return pattern.mask(torch.rand(n, k, generator=generator))
    score = torch.rand(pattern.blocks(n, k), generator=generator)
    dropped = score.numel() - pattern.blocks_kept(n, k)
    if dropped:
        border = np.partition(score.numpy(), dropped - 1, axis=None)[dropped - 1]
        kept = score > float(border)
    else:
        kept = torch.ones_like(score, dtype=torch.bool)
    corners = torch.zeros(n, k, dtype=torch.bool)
    corners[:: pattern.block_shape[0], :: pattern.block_shape[1]] = kept
    return pattern.cover(corners)


def streamed_bytes(pattern: sk.Pattern, n: int, k: int, dtype: torch.dtype) -> int:
    """What a kernel must read of a packed weight: values and positions, nothing twice."""
    if isinstance(pattern, sk.NM):
        slots = -(-k // pattern.m) * pattern.n
        bits = 2 if pattern.m <= 4 else 4
        return n * slots * dtype.itemsize + n * slots * bits // 8
    assert isinstance(pattern, sk.BlockSparse)
    rows, columns = pattern.block_shape
    return pattern.blocks_kept(n, k) * (rows * columns * dtype.itemsize + 4)


# Multiply-adds of a float64 reference that take well below a second.
_CHECKED = 1 << 31


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Holds a result to the package's tolerance rule, a large one by some of its rows.

    The first and the last row are always among them: there tiles begin and end.

    Raises:
        AssertionError: The result is wrong.
    """
    m = x.shape[0]
    count = max(2, _CHECKED // weight.numel())
    rows = torch.arange(m)
    if count < m:
        inner = torch.randperm(m - 2, generator=torch.Generator().manual_seed(0)) + 1
        rows = torch.cat([rows[:1], inner[: count - 2], rows[-1:]])
        assert bool(y.isfinite().all()), "the result holds a NaN or an infinity"
    testing.assert_matmul_close(y[rows], x[rows], weight, bias)


@dataclass(frozen=True)
class Prepared:
    """A case ready to be timed.

    Attributes:
        kernel: Id of the kernel that runs.
        layer: What is multiplied with.
        ours: The sparse call.
        dense: Baselines that multiply the dense matrix.
        sparse: Baselines that know of the zeros.
        unavailable: Baselines that cannot run this case, and why.
    """

    kernel: str
    layer: Layer
    ours: Callable[[], Tensor]
    dense: dict[str, Callable[[], Tensor]]
    sparse: dict[str, Callable[[], Tensor]]
    unavailable: dict[str, str]


def prepare(case: Case, baselines: Sequence[Baseline] = BASELINES) -> Prepared:
    """Builds every path of a case and checks our result by the package's tolerance rule.

    Args:
        case: What to build.
        baselines: What to build beside it.

    Raises:
        AssertionError: Our result is wrong.
    """
    shape, m = case.shape, case.m
    layer = random_layer(shape.n, shape.k, case.pattern, case.dtype)
    weight, bias, packed = layer.weight, layer.bias, layer.packed
    x = torch.randn(m, shape.k, generator=torch.Generator().manual_seed(m)).to(case.dtype)
    if case.kernel is None:
        chosen = sk.explain(packed, m=m).chosen
        kernel = chosen.kernel if chosen else ""

        def ours() -> Tensor:
            return sk.linear(x, packed, bias)
    else:
        kernel = case.kernel.name
        data = _native.pack(packed.canonical(), case.kernel.format)
        y = torch.empty(m, shape.n, dtype=case.dtype)

        def ours() -> Tensor:
            _native.matmul(x, data, y, bias, kernel=kernel)
            return y

    with torch.inference_mode():
        check(ours(), x, weight, bias)
    paths: dict[bool, dict[str, Callable[[], Tensor]]] = {True: {}, False: {}}
    unavailable = {}
    for baseline in baselines:
        try:
            paths[baseline.dense][baseline.name] = baseline.build(weight, bias, x)
        except Unavailable as reason:
            unavailable[baseline.name] = str(reason)
    return Prepared(kernel, layer, ours, paths[True], paths[False], unavailable)


def machine() -> dict[str, str]:
    """What a figure depends on besides the case."""
    cpu = _native.cpu_info()
    return {"cpu": str(cpu["model"]), "isa": str(cpu["isa"]), "torch": torch.__version__}
