"""What `bench.gpu` measures: regimes, their cases and goals, what a call must move and do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

import sparsekit as sk
from bench.case import streamed_bytes
from sparsekit import _native

SIZES = (
    (4096, 4096),
    (8192, 8192),
    (14336, 4096),
    (28672, 8192),
    (5120, 13824),
    (27648, 5120),
)
"""(n, k): layers of language models with 8, 14 and 70 billion weights."""

_SOME = SIZES[:3]
_FEW_TOKENS = (1, 4, 8, 16)
_MANY_TOKENS = (4096, 16384)


@dataclass(frozen=True)
class Regime:
    """Cases that share what limits them.

    Attributes:
        name: For the command line and the tables.
        pattern: Of the weight.
        dtype: Of weight and activations.
        rows: Values of m.
        sizes: (n, k).
    """

    name: str
    pattern: str
    dtype: torch.dtype
    rows: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = SIZES


def _blocks(side: int, sparsity: float) -> Regime:
    return Regime(
        f"gemm-bsr{side}@{sparsity}-f16",
        f"bsr{side}x{side}@{sparsity}",
        torch.float16,
        _MANY_TOKENS,
        _SOME,
    )


REGIMES = (
    Regime("decode-2:4-f16", "2:4", torch.float16, _FEW_TOKENS),
    Regime("decode-bsr64@0.9-f16", "bsr64x64@0.9", torch.float16, _FEW_TOKENS),
    _blocks(64, 0.75),
    _blocks(64, 0.9),
    Regime("gemm-2:4-f16", "2:4", torch.float16, (64, 256, 1024, *_MANY_TOKENS)),
    Regime("decode-2:4-bf16", "2:4", torch.bfloat16, _FEW_TOKENS),
    Regime("gemm-2:4-bf16", "2:4", torch.bfloat16, (4096,), _SOME),
    *(_blocks(side, sparsity) for side in (128, 32, 16) for sparsity in (0.75, 0.9)),
)
"""The most important first: a run that is short of time leaves out the last."""

QUICK_SIZES = ((8192, 8192), (14336, 4096))

# torch.compile needs tens of seconds for a case; these are enough to see whether it beats cuBLAS.
_COMPILED_SIZES = ((8192, 8192), (28672, 8192))
_COMPILED_ROWS = (1, 16, 4096)


@dataclass(frozen=True)
class Job:
    """One case: a layer of a regime at a number of tokens."""

    regime: Regime
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.regime.name} m={self.m} {self.n}x{self.k}"

    @property
    def dtype(self) -> str:
        return _native.DTYPE_NAMES[self.regime.dtype]

    @cached_property
    def pattern(self) -> sk.Pattern:
        return sk.parse_pattern(self.regime.pattern)

    @property
    def weight_bytes(self) -> int:
        """Of the packed weight: values and positions."""
        return streamed_bytes(self.pattern, self.n, self.k, self.regime.dtype)

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes of a call: weight and x read once, y written once."""
        return self.weight_bytes + self.m * (self.n + self.k) * self.regime.dtype.itemsize

    @property
    def operations(self) -> int:
        """Of the dense product."""
        return 2 * self.m * self.n * self.k

    @property
    def instruction(self) -> str:
        """What multiplies, as bench/micro/mma_rate.cu calls it."""
        return "mma.sp.m16n8k32" if self.pattern.family == "nm" else "mma.m16n8k16"

    @property
    def instruction_operations(self) -> int:
        """As the instruction's rate counts them: that of mma.sp is the dense product's."""
        if isinstance(self.pattern, sk.BlockSparse):
            rows, columns = self.pattern.block_shape
            return 2 * self.m * self.pattern.blocks_kept(self.n, self.k) * rows * columns
        return self.operations

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is among the dense paths."""
        size = (self.n, self.k)
        return (
            isinstance(self.pattern, sk.NM)
            and self.regime.dtype == torch.float16
            and size in _COMPILED_SIZES
            and self.m in _COMPILED_ROWS
        )


def jobs(
    regimes: Iterable[Regime],
    sizes: Sequence[tuple[int, int]] | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Job]:
    """Every case of some regimes.

    Args:
        regimes: In the order to measure.
        sizes: (n, k) instead of the regimes' own.
        rows: Values of m to keep; None keeps all.
    """
    for regime in regimes:
        for n, k in sizes or regime.sizes:
            for m in regime.rows:
                if rows is None or m in rows:
                    yield Job(regime, m, n, k)


def quick(regimes: Iterable[Regime]) -> Iterator[Job]:
    """A few cases of each regime: two sizes, the fewest and the most tokens but 16384."""
    for regime in regimes:
        rows = [m for m in regime.rows if m <= 4096]
        yield from jobs([regime], QUICK_SIZES, [rows[0], rows[-1]])


FASTEST_DENSE = "fastest dense"
BANDWIDTH = "copy bandwidth"
INSTRUCTION_RATE = "instruction rate"


@dataclass(frozen=True)
class Goal:
    """The geometric mean over some cases of a regime that is promised.

    Attributes:
        regime: Name of the regime.
        over: What is divided by: a peer's name, `FASTEST_DENSE`, or one of the GPU's own rates.
        least: The promise.
        large: Only layers of at least 64 MB as a dense 16-bit matrix count.
        least_rows: Only so many tokens and more count.
    """

    regime: str
    over: str
    least: float
    large: bool = False
    least_rows: int = 0

    def counts(self, n: int, k: int, m: int) -> bool:
        return (not self.large or 2 * n * k >= 64_000_000) and m >= self.least_rows

    @property
    def cases(self) -> str:
        limits = ["layers of 64 MB and more"] if self.large else []
        limits += [f"m >= {self.least_rows}"] if self.least_rows else []
        return ", ".join(limits) or "all"


GOALS = (
    Goal("decode-2:4-f16", FASTEST_DENSE, 1.6, large=True),
    Goal("decode-2:4-f16", "cuSPARSELt", 1.4, large=True),
    Goal("decode-2:4-f16", BANDWIDTH, 0.8, large=True),
    Goal("decode-bsr64@0.9-f16", FASTEST_DENSE, 6.0, large=True),
    Goal("gemm-bsr64@0.75-f16", FASTEST_DENSE, 2.2),
    Goal("gemm-bsr64@0.75-f16", "torch BSR", 1.3),
    Goal("gemm-bsr64@0.9-f16", FASTEST_DENSE, 5.0),
    Goal("gemm-bsr64@0.9-f16", "torch BSR", 1.3),
    Goal("gemm-2:4-f16", INSTRUCTION_RATE, 0.8, least_rows=4096),
)
