"""Sparsity patterns: what may be kept, and the one place that turns a score into a mask.

A pattern is a small frozen value. `NM(2, 4)` keeps 2 of every 4 consecutive values along k,
`BlockSparse((16, 16), 0.75)` keeps a quarter of the 16x16 blocks. `str(pattern)` is the spelling
used in files, reports and on the command line; `parse_pattern` reads it back.
"""

from __future__ import annotations

import fnmatch
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

GROUP_SIZES = (2, 4, 8, 16)
VECTOR_SIZES = (1, 4, 8, 16)
MAX_BLOCK = 128

# Below this fraction of zeros a weight counts as dense: a few dead rows are no pattern.
MIN_DETECTED_SPARSITY = 0.4
# Zero blocks must hold this share of all zeros before they are called the pattern; the rest may be
# values that became zero by chance (rounding, underflow) inside kept blocks.
MIN_BLOCK_COVERAGE = 0.99
# An unusual N:M must not store more than this times the values there are; else it fits by chance.
MAX_SLACK = 1.15

# Scores are ranked in slabs of about this many elements, so temporaries stay small.
_SLAB = 1 << 22


class Pattern(ABC):
    """What a sparse weight `W[n, k]` may keep.

    Attributes:
        family: `"nm"` or `"bsr"`, the layout family that stores it.
    """

    family: ClassVar[str]

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Fraction of the values that is zero."""

    @property
    @abstractmethod
    def row_tile(self) -> int:
        """Rows that are decided together (vector length or block rows)."""

    @property
    @abstractmethod
    def k_tile(self) -> int:
        """Columns that are decided together (M or block columns)."""

    @abstractmethod
    def mask(self, score: Tensor) -> Tensor:
        """Keep the best-scored positions the pattern allows.

        Args:
            score: `[n, k]`, any floating dtype, higher = keep. Ties keep the lower row and column.

        Returns:
            bool `[n, k]`, True = kept, on the score's device. Tiles cut by the edge of the matrix
            are handled as if the missing positions had the lowest score.

        Raises:
            ValueError: the score is not 2-D, not floating point, or holds a NaN.
        """

    @abstractmethod
    def cover(self, mask: Tensor) -> Tensor:
        """Positions that are stored when `mask` is kept: whole vectors and whole blocks.

        Args:
            mask: bool `[n, k]`.

        Returns:
            bool `[n, k]`, a superset of `mask`.
        """

    @abstractmethod
    def first_violation(self, mask: Tensor) -> str | None:
        """Say where a mask keeps more than the pattern allows.

        Args:
            mask: bool `[n, k]`, True = kept. Keeping less than allowed is fine.

        Returns:
            None when the mask fits, else a sentence such as
            `"rows 4-7, columns 8-11 keep 3 of 4, at most 2 are allowed"`.
        """

    def fits(self, mask: Tensor) -> bool:
        """Whether the mask keeps no more than the pattern allows."""
        return self.first_violation(mask) is None


@dataclass(frozen=True)
class NM(Pattern):
    """N:M sparsity: `n` values kept of every `m` consecutive ones along k.

    `vector` consecutive output rows share their positions ("2:4v4"). A vector-wise pattern is
    also a valid plain N:M pattern.

    Args:
        n: values kept per group, `1 <= n < m`.
        m: group size along k: 2, 4, 8 or 16.
        vector: rows that share positions: 1, 4, 8 or 16.

    Raises:
        ValueError: a number outside these ranges.
    """

    n: int
    m: int
    vector: int = 1

    family: ClassVar[str] = "nm"

    def __post_init__(self) -> None:
        if self.m not in GROUP_SIZES:
            raise ValueError(f"NM: m must be one of {GROUP_SIZES}, got {self.m}")
        if not 1 <= self.n < self.m:
            raise ValueError(f"NM: n must be between 1 and m-1={self.m - 1}, got {self.n}")
        if self.vector not in VECTOR_SIZES:
            raise ValueError(f"NM: vector must be one of {VECTOR_SIZES}, got {self.vector}")

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    @property
    def row_tile(self) -> int:
        return self.vector

    @property
    def k_tile(self) -> int:
        return self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f"v{self.vector}" if self.vector > 1 else "")

    def mask(self, score: Tensor) -> Tensor:
        _check_score(score)
        rows, columns = score.shape
        out = torch.empty(rows, columns, dtype=torch.bool, device=score.device)
        for start, stop in _slabs(rows, columns, self.vector):
            keep = self._mask_slab(score[start:stop])
            out[start:stop] = keep
        return out

    def _mask_slab(self, score: Tensor) -> Tensor:
        rows, columns = score.shape
        summed = _fold_rows(_as_float(score), self.vector)
        if bool(summed.isnan().any()):
            raise ValueError("mask: the score holds NaN (or infinities that cancel)")
        groups = -(-columns // self.m)
        # Positions beyond k come last in their group, so ties already favour the real ones.
        padded = nn.functional.pad(summed, (0, groups * self.m - columns), value=-torch.inf)
        by_position = padded.view(-1, groups, self.m).permute(2, 0, 1).contiguous()
        # How many positions of its group are better; of equals, the earlier one is.
        beaten = torch.zeros_like(by_position, dtype=torch.uint8)
        for later in range(self.m):
            for earlier in range(later):
                loses = by_position[earlier] >= by_position[later]
                beaten[later] += loses
                beaten[earlier] += ~loses
        keep = beaten < self.n
        flat = keep.permute(1, 2, 0).reshape(-1, groups * self.m)[:, :columns]
        return flat.repeat_interleave(self.vector, 0)[:rows]

    def cover(self, mask: Tensor) -> Tensor:
        _check_mask(mask)
        if self.vector == 1:
            return mask.clone()
        union = _any_rows(mask, self.vector)
        return union.repeat_interleave(self.vector, 0)[: mask.shape[0]]

    def first_violation(self, mask: Tensor) -> str | None:
        _check_mask(mask)
        rows, columns = mask.shape
        if mask.numel() == 0:
            return None
        counts = _count_groups(_any_rows(mask, self.vector), self.m)
        groups = counts.shape[1]
        bad = counts > self.n
        if not bool(bad.any()):
            return None
        row, group = divmod(int(bad.flatten().to(torch.uint8).argmax()), groups)
        width = min(self.m, columns - group * self.m)
        where = (
            f"{_span('row', row * self.vector, min(rows, (row + 1) * self.vector))}, "
            f"{_span('column', group * self.m, group * self.m + width)}"
        )
        verb = "keep" if self.vector == 1 else "together keep"
        return f"{where} {verb} {int(counts[row, group])} of {width}, at most {self.n} are allowed"


@dataclass(frozen=True)
class BlockSparse(Pattern):
    """Block sparsity (BSR): whole blocks of the matrix are zero.

    Args:
        block_shape: (rows of n, columns of k), each 1 to 128. `(1, 1)` is unstructured sparsity.
        sparsity: fraction of the blocks that is zero, 0 to 1. `round((1 - sparsity) * blocks)`
            blocks of the whole matrix are kept, below 1 at least one of them; blocks cut by the
            edge count as blocks.

    Raises:
        ValueError: a number outside these ranges.
    """

    block_shape: tuple[int, int]
    sparsity: float = 0.5

    family: ClassVar[str] = "bsr"

    def __post_init__(self) -> None:
        shape = tuple(int(side) for side in self.block_shape)
        if len(shape) != 2 or not all(1 <= side <= MAX_BLOCK for side in shape):
            raise ValueError(
                f"BlockSparse: block_shape must be two numbers from 1 to {MAX_BLOCK} "
                f"(rows of n, columns of k), got {self.block_shape}"
            )
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"BlockSparse: sparsity must be from 0 to 1, got {self.sparsity}")
        object.__setattr__(self, "block_shape", shape)
        object.__setattr__(self, "sparsity", float(self.sparsity))

    @property
    def row_tile(self) -> int:
        return self.block_shape[0]

    @property
    def k_tile(self) -> int:
        return self.block_shape[1]

    def __str__(self) -> str:
        return f"bsr{self.block_shape[0]}x{self.block_shape[1]}@{self.sparsity!r}"

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Blocks along n and along k of a `[rows, columns]` matrix, cut ones included."""
        return -(-rows // self.block_shape[0]), -(-columns // self.block_shape[1])

    def blocks_kept(self, rows: int, columns: int) -> int:
        """How many blocks of a `[rows, columns]` matrix may stay."""
        down, across = self.blocks(rows, columns)
        kept = round((1.0 - self.sparsity) * down * across)
        return kept if self.sparsity == 1.0 else max(1, kept)

    def mask(self, score: Tensor) -> Tensor:
        _check_score(score)
        rows, columns = score.shape
        block_rows, block_columns = self.block_shape
        down, across = self.blocks(rows, columns)
        summed = torch.empty(down, across, dtype=_sum_dtype(score), device=score.device)
        for start, stop in _slabs(rows, columns, block_rows):
            folded = _fold_rows(_as_float(score[start:stop]), block_rows)
            padded = nn.functional.pad(folded, (0, across * block_columns - columns))
            first = start // block_rows
            summed[first : first + folded.shape[0]] = padded.view(-1, across, block_columns).sum(2)
        if bool(summed.isnan().any()):
            raise ValueError("mask: the score holds NaN (or infinities that cancel)")
        order = summed.flatten().argsort(descending=True, stable=True)
        keep = torch.zeros(down * across, dtype=torch.bool, device=score.device)
        keep[order[: self.blocks_kept(rows, columns)]] = True
        return self._expand(keep.view(down, across), rows, columns)

    def cover(self, mask: Tensor) -> Tensor:
        _check_mask(mask)
        return self._expand(self.occupancy(mask), *mask.shape)

    def occupancy(self, mask: Tensor) -> Tensor:
        """Which blocks hold a kept value: bool `[blocks along n, blocks along k]`."""
        union = _any_rows(mask, self.block_shape[0])
        return _any_columns(union, self.block_shape[1])

    def first_violation(self, mask: Tensor) -> str | None:
        _check_mask(mask)
        rows, columns = mask.shape
        occupied = self.occupancy(mask)
        allowed = self.blocks_kept(rows, columns)
        total = int(occupied.sum())
        if total <= allowed:
            return None
        # The first block that is one too many, in row order.
        surplus = int((occupied.flatten().cumsum(0) > allowed).to(torch.uint8).argmax())
        row, column = divmod(surplus, occupied.shape[1])
        height, width = self.block_shape
        return (
            f"{total} of {occupied.numel()} blocks of {height}x{width} are kept, at most {allowed} "
            f"are allowed; the first one too many is at "
            f"{_span('row', row * height, min(rows, (row + 1) * height))}, "
            f"{_span('column', column * width, min(columns, (column + 1) * width))}"
        )

    def _expand(self, blocks: Tensor, rows: int, columns: int) -> Tensor:
        block_rows, block_columns = self.block_shape
        wide = blocks.repeat_interleave(block_columns, 1)[:, :columns]
        return wide.repeat_interleave(block_rows, 0)[:rows]


PatternLike: TypeAlias = Pattern | str
PatternChoice: TypeAlias = PatternLike | Mapping[str, PatternLike | None]

_NM_SPELLING = re.compile(r"(\d+):(\d+)(?:v(\d+))?")
_BSR_SPELLING = re.compile(r"bsr(\d+)x(\d+)(?:@([0-9.eE+-]+))?")


def parse_pattern(pattern: PatternLike) -> Pattern:
    """Read a pattern: "2:4", "2:4v4", "bsr16x16@0.75", or a `Pattern`, which is returned as it is.

    Raises:
        ValueError: not a pattern; the message lists the spellings.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        if found := _NM_SPELLING.fullmatch(pattern):
            return NM(int(found[1]), int(found[2]), int(found[3] or 1))
        if found := _BSR_SPELLING.fullmatch(pattern):
            try:
                sparsity = float(found[3]) if found[3] else 0.5
            except ValueError:
                raise ValueError(f"pattern {pattern!r}: {found[3]!r} is no number") from None
            return BlockSparse((int(found[1]), int(found[2])), sparsity)
    raise ValueError(
        f"pattern: expected a Pattern or a spelling such as '2:4', '2:4v4', '1:4' or "
        f"'bsr16x16@0.75', got {pattern!r}"
    )


def at_density(pattern: Pattern, density: float) -> Pattern | None:
    """The pattern of the same kind that keeps another fraction of the values.

    Args:
        pattern: blocks take any density. N:M keeps the `n` nearest to `density · m`, at least 1,
            of equally near ones the larger.
        density: fraction kept, 0 to 1.

    Returns:
        The pattern, or None where everything is kept: the layer stays dense.

    Raises:
        ValueError: the density is not from 0 to 1.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"at_density: density must be from 0 to 1, got {density}")
    if isinstance(pattern, NM):
        n = max(1, math.floor(density * pattern.m + 0.5))
        return None if n == pattern.m else replace(pattern, n=n)
    if isinstance(pattern, BlockSparse):
        return None if density == 1.0 else replace(pattern, sparsity=1.0 - density)
    raise ValueError(f"at_density: expected an N:M or block pattern, got {pattern}")


# --- choosing modules -------------------------------------------------------------------------


def match(name: str, expression: str) -> bool:
    """Whether a module name matches a glob, or, after `re:`, a regular expression (whole name)."""
    if expression.startswith("re:"):
        try:
            return re.fullmatch(expression[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{expression!r} is no regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, expression)


def exactly(name: str) -> str:
    """The expression that matches this module name and no other: the name itself, mostly."""
    escaped = re.sub(r"([*?[])", r"[\1]", name)
    return f"[r]{escaped[1:]}" if escaped.startswith("re:") else escaped


def resolve_pattern(name: str, pattern: PatternChoice) -> Pattern | None:
    """The pattern for one module.

    Args:
        name: the module's dotted name.
        pattern: one pattern for all modules, or a mapping from globs and `re:` expressions to
            patterns. The first expression that matches wins; the value None means "leave dense".

    Returns:
        The pattern, or None when the mapping leaves this module dense.
    """
    if not isinstance(pattern, Mapping):
        return parse_pattern(pattern)
    for expression, choice in pattern.items():
        if match(name, expression):
            return None if choice is None else parse_pattern(choice)
    return None


def select_modules(
    model: nn.Module,
    targets: str | Sequence[str] | None,
    ignore: str | Sequence[str] | None,
    types: tuple[type[nn.Module], ...],
) -> list[tuple[str, nn.Module]]:
    """Modules of the given types, chosen by name.

    Args:
        model: searched with `named_modules()`, so a shared module appears once. The model itself
            has the name "".
        targets: globs or `re:` expressions; None means all.
        ignore: modules left out, same expressions; wins over `targets`.
        types: classes to look for (subclasses included).

    Returns:
        (name, module) in the model's order.

    Raises:
        ValueError: an expression in `targets` matches no module of these types.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, types)]
    wanted = _expressions(targets)
    if wanted is not None:
        require_match(wanted, [name for name, _ in found], "targets")
        found = [(name, module) for name, module in found if any(match(name, e) for e in wanted)]
    unwanted = _expressions(ignore) or []
    return [(name, module) for name, module in found if not any(match(name, e) for e in unwanted)]


def require_match(expressions: Iterable[str], names: Sequence[str], what: str) -> None:
    """Refuse an expression that matches none of the names: it is a typing error.

    Raises:
        ValueError: names the expression and a few of the names there are.
    """
    for expression in expressions:
        if not any(match(name, expression) for name in names):
            some = ", ".join(repr(name) for name in names[:5]) or "none"
            raise ValueError(
                f"{what}: {expression!r} matches no layer; the layers are {some}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            )


def _expressions(value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) else list(value)


# --- recognising ------------------------------------------------------------------------------

_USUAL_NM = ((1, 4), (2, 4), (4, 8))
_DETECTED_SIDES = (64, 32, 16, 8, 4, 2, 1)


def detect_pattern(
    weight: Tensor, columns: Tensor | None = None, widest: int = 64
) -> Pattern | None:
    """Which pattern the zeros of a weight already follow.

    Tries the most structured first: blocks from 64x64 down to four values; N:M with vectors of 16
    rows down to 4; blocks one column wide (64x1 to 4x1); plain N:M. -0.0 counts as zero. 1:4, 2:4
    and 4:8 are recognised whenever they fit, any other N:M only if it keeps hardly more than the
    values there are.

    Args:
        weight: `[n, k]`, any floating dtype.
        columns: bool `[k]`, False for padding, whose zeros say nothing; None: there is none.
        widest: columns that are decided together at most, a power of two.

    Returns:
        The pattern (for blocks with the fraction of zero blocks found), or None when less than
        40 % is zero or the zeros follow none of these patterns.

    Raises:
        ValueError: the weight is not 2-D.
    """
    if weight.dim() != 2:
        raise ValueError(f"detect: expected a weight of shape [n, k], got {list(weight.shape)}")
    kept = weight != 0
    if kept.numel() == 0:
        return None
    if columns is None:
        columns = torch.ones(kept.shape[1], dtype=torch.bool, device=kept.device)
    values = kept.shape[0] * int(columns.sum())
    zeros = values - int(kept.sum())
    if zeros < MIN_DETECTED_SPARSITY * values:
        return None
    occupancy = _occupancies(kept, widest)
    # A vector-wise N:M weight also consists of zero columns of blocks, so those come after it.
    shapes = sorted(occupancy, key=lambda shape: (-shape[0] * shape[1], abs(shape[0] - shape[1])))
    wide = [shape for shape in shapes if shape[1] > 1 and shape[0] * shape[1] >= 4]
    tall = [shape for shape in shapes if shape[1] == 1 and shape[0] >= 4]
    found = _detect_blocks(columns, kept.shape[0], occupancy, wide, zeros)
    if found is None:
        vectors = {rows: occupancy[rows, 1] for rows in VECTOR_SIZES if rows > 1}
        found = _detect_nm(vectors, zeros, values, widest)
    if found is None:
        found = _detect_blocks(columns, kept.shape[0], occupancy, tall, zeros)
    if found is None:
        found = _detect_nm({1: kept}, zeros, values, widest)
    return found


def _detect_nm(
    unions: Mapping[int, Tensor], zeros: int, values: int, widest: int
) -> Pattern | None:
    densest = max(0.5, MAX_SLACK * (1.0 - zeros / values))
    found = []
    for vector, union in unions.items():
        if int(union.sum()) > densest * union.numel():
            continue  # no group size can bring it below its own mean
        for m in (size for size in GROUP_SIZES if size <= widest):
            n = max(1, int(_count_groups(union, m).max()))
            usual = next((have for have in _USUAL_NM if have[1] == m and n <= have[0]), None)
            if n < m and n / m <= MAX_SLACK * (1.0 - zeros / values):
                found.append(NM(n, m, vector))
            elif usual:
                found.append(NM(*usual, vector))
    # The sparsest; of equally sparse ones the usual, the finest group, the longest vector.
    return min(
        found,
        key=lambda p: (p.n / p.m, (p.n, p.m) not in _USUAL_NM, p.m, -p.vector),
        default=None,
    )


def _detect_blocks(
    columns: Tensor,
    rows: int,
    occupancy: Mapping[tuple[int, int], Tensor],
    shapes: Iterable[tuple[int, int]],
    zeros: int,
) -> Pattern | None:
    for shape in shapes:
        down, across = shape
        padded = nn.functional.pad(columns, (0, -columns.numel() % across))
        widths = padded.view(-1, across).sum(1)
        # Blocks of nothing but padding do not count.
        occupied, widths = occupancy[shape][:, widths > 0], widths[widths > 0].double()
        heights = torch.full_like(occupied[:, 0], down, dtype=torch.float64)
        heights[-1] = rows - down * (heights.numel() - 1)
        empty = ~occupied
        if int(heights @ empty.double() @ widths) >= MIN_BLOCK_COVERAGE * zeros:
            return BlockSparse(shape, _short_sparsity(int(empty.sum()), empty.numel()))
    return None


def _occupancies(kept: Tensor, widest: int) -> dict[tuple[int, int], Tensor]:
    """Which blocks hold a value, for every pair of sides; each from the next smaller one."""
    sides = _DETECTED_SIDES[::-1]
    out = {(1, 1): kept}
    for across in (side for side in sides if side <= widest):
        if across > 1:
            out[1, across] = _any_columns(out[1, across // 2], 2)
        for down in sides[1:]:
            out[down, across] = _any_rows(out[down // 2, across], 2)
    return out


def _short_sparsity(empty: int, total: int) -> float:
    """The shortest decimal that keeps exactly `total - empty` of `total` blocks."""
    exact = empty / total
    for digits in range(1, 17):
        short = round(exact, digits)
        if round((1.0 - short) * total) == total - empty and (short < 1.0) == (empty < total):
            return short
    return exact


# --- small helpers ----------------------------------------------------------------------------


def _check_score(score: Tensor) -> None:
    if score.dim() != 2:
        raise ValueError(f"mask: expected a score of shape [n, k], got {list(score.shape)}")
    if not score.is_floating_point():
        raise ValueError(f"mask: expected a floating-point score, got {score.dtype}")


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected a bool tensor of shape [n, k], got {mask.dtype} {list(mask.shape)}"
        )


def _sum_dtype(score: Tensor) -> torch.dtype:
    return torch.float64 if score.dtype == torch.float64 else torch.float32


def _as_float(score: Tensor) -> Tensor:
    return score.to(_sum_dtype(score))


def _slabs(rows: int, columns: int, tile: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `_SLAB` elements that never cut a tile."""
    step = max(1, _SLAB // max(1, columns * tile)) * tile
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _fold_rows(score: Tensor, tile: int) -> Tensor:
    """Sum of each `tile` rows; the last sum may hold fewer."""
    if tile == 1:
        return score
    padded = nn.functional.pad(score, (0, 0, 0, -score.shape[0] % tile))
    return padded.view(-1, tile, score.shape[1]).sum(1)


def _any_rows(mask: Tensor, tile: int) -> Tensor:
    """Whether any of each `tile` rows is True; the last group may hold fewer."""
    if tile == 1:
        return mask
    padded = nn.functional.pad(mask, (0, 0, 0, -mask.shape[0] % tile))
    rows = padded.reshape(-1, tile, mask.shape[1])
    out = rows[:, 0].clone()
    for row in range(1, tile):
        out |= rows[:, row]
    return out


def _any_columns(mask: Tensor, tile: int) -> Tensor:
    """Whether any of each `tile` columns is True; the last group may hold fewer."""
    for width, integer in _INTEGERS.items():
        if tile % width == 0:  # bytes side by side, tested as one number
            return _any_columns(_side_by_side(mask, width, integer) != 0, tile // width)
    if tile == 1:
        return mask
    padded = nn.functional.pad(mask, (0, -mask.shape[1] % tile))
    return padded.view(mask.shape[0], -1, tile).any(2)


def _count_groups(mask: Tensor, m: int) -> Tensor:
    """How many of each `m` columns are True, `[rows, groups]`; the last group may hold fewer."""
    if m == 16:
        halves = nn.functional.pad(mask, (0, -mask.shape[1] % m))
        counts = _count_groups(halves, 8)
        return counts[:, ::2] + counts[:, 1::2]
    # Bytes of 0 or 1 side by side: the top byte of this product is their sum.
    ones = sum(1 << 8 * byte for byte in range(m))
    return (_side_by_side(mask, m, _INTEGERS[m]) * ones) >> 8 * (m - 1)


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _side_by_side(mask: Tensor, width: int, integer: torch.dtype) -> Tensor:
    """Each `width` bytes of a row as one integer; a row is filled up with zeros."""
    missing = -mask.shape[1] % width
    whole = nn.functional.pad(mask, (0, missing)) if missing else mask.contiguous()
    # A slice may start at an address that is no multiple of the integer's size.
    return (whole.clone() if whole.data_ptr() % width else whole).view(integer)


def _span(what: str, start: int, stop: int) -> str:
    return f"{what} {start}" if stop - start == 1 else f"{what}s {start}-{stop - 1}"
