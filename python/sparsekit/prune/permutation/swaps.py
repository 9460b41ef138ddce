"""The search behind `find_permutation` and `permute`: swaps of channels between groups.

A *place* is a position in the order; places are cut into groups (of M, of the columns or rows of a
block, of the rows of a vector). `Search` swaps channels between groups as long as the sum over its
*terms* rises. A term knows what the weights keep in an order, and what each group gains when one
of its places takes another channel: a matrix `[places, channels]`.

Nearly all terms come down to one sum. When a group gives up the channel at place p for channel c,
what it then keeps is `base[p] + Σ relu(score[c] - level[p])` over rows:

- columns of N:M: `level` is the N-th largest of the group's other values, `base` the sum of the N
  largest.
- blocks: `level` is what the other channels lack to the least block that is kept, `base` is 0.
  Exact while that least block stays the same, and never too little.

Σ relu(a - b) = (Σ|a - b| + Σ(a - b)) / 2, so a matrix of L1 distances has the gain of every swap.
Swaps that share no group add up, so that a round can take many.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.patterns import NM, BlockSparse, Pattern

# Of all pairs of groups, so many times the number of groups are candidates in one round.
_CANDIDATES = 8
# Most searches for cycles after the last swap, and how long a cycle may be. On trained weights they
# add a tenth to what swaps gain for N:M, and nothing for blocks, whose gains are less exact.
_ESCAPES = 48
_LONGEST = 12


class Term(ABC):
    """Scores of the channels in one role.

    Attributes:
        scores: `[channels, ...]`.
        width: places in a group.
        local: whether a group's gains hang on its own channels alone.
    """

    local = True

    def __init__(self, scores: Tensor, width: int) -> None:
        self.scores = scores.contiguous()
        self.width = width
        self.channels = len(scores)

    def grouped(self, order: Tensor, groups: Tensor) -> Tensor:
        """Scores `[groups, width, ...]`; what the last group lacks is zero."""
        places = F.pad(order, (0, -len(order) % self.width), value=-1).view(-1, self.width)
        chosen = places[groups]
        empty = (chosen < 0).view(*chosen.shape, *[1] * (self.scores.dim() - 1))
        return self.scores[chosen].masked_fill_(empty, 0)

    @abstractmethod
    def kept(self, order: Tensor, groups: Tensor) -> float:
        """What these groups keep in this order; all of them unless the term is local."""

    @abstractmethod
    def gains(self, order: Tensor, groups: Tensor) -> Tensor:
        """`[groups, width, channels]`: what the group gains with the channel in that place."""


class _Levels(Term):
    """The terms whose gains come from L1 distances; scores are `[channels, rows]`."""

    def __init__(self, scores: Tensor, width: int) -> None:
        super().__init__(scores, width)
        self._sums = _sum(self.scores).to(scores.dtype)

    def gains(self, order: Tensor, groups: Tensor) -> Tensor:
        base, level, now = self.levels(self.grouped(order, groups))
        gain = torch.cdist(level.flatten(0, 1), self.scores, p=1.0)
        own = base - now[:, None] - _sum(level) / 2
        gain.add_(self._sums).div_(2).add_(own.view(-1, 1).to(gain.dtype))
        return gain.view(*level.shape[:2], -1)

    @abstractmethod
    def levels(self, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`base [groups, width]`, `level [groups, width, rows]`, and what groups keep now."""


class Columns(_Levels):
    """Columns of N:M weights.

    Args:
        scores: `[channels, rows]`, vectors added up.
        pattern: the groups are of its M.
    """

    def __init__(self, scores: Tensor, pattern: NM) -> None:
        super().__init__(scores, pattern.m)
        self._n = pattern.n

    def kept(self, order: Tensor, groups: Tensor) -> float:
        return float(_sum(_largest(self.grouped(order, groups), self._n, 1)).sum())

    def levels(self, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = grouped.topk(self._n + 1, 1).values
        least, following = best[:, self._n - 1 : self._n], best[:, self._n :]
        level = torch.where(grouped >= least, following, least)
        kept = best[:, : self._n].sum(1, keepdim=True)
        base = kept - (grouped - following).clamp(min=0).where(grouped >= least, 0)
        return _sum(base), level, _sum(kept.squeeze(1))


class Blocks(_Levels):
    """Columns or rows of a block-sparse weight, which ranks all of its blocks.

    Args:
        scores: `[channels, across]`, summed over the other side of the blocks.
        width: channels in a block.
        kept: blocks of the weight that are kept.
    """

    local = False

    def __init__(self, scores: Tensor, width: int, kept: int) -> None:
        super().__init__(scores, width)
        self._kept = kept

    def kept(self, order: Tensor, groups: Tensor) -> float:
        sums = self.grouped(order, _all(order, self.width)).sum(1).flatten()
        return float(_sum(sums.topk(min(self._kept, len(sums))).values))

    def levels(self, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = grouped.sum(1, keepdim=True)
        top = sums.flatten().topk(min(self._kept, sums.numel())).values
        least = top[-1] if len(top) else torch.inf
        level = least - (sums - grouped)
        now = _sum((sums - least).clamp(min=0).squeeze(1))
        return _sum(torch.zeros_like(grouped)), level, now


class Vectors(Term):
    """Rows of a vector-wise N:M weight: which of them share their positions.

    Args:
        scores: `[channels, M, groups of columns]`.
        pattern: N:M with vectors.
        width: rows in a vector, counted in channels.
    """

    def __init__(self, scores: Tensor, pattern: NM, width: int) -> None:
        super().__init__(scores, width)
        self._n = pattern.n

    def kept(self, order: Tensor, groups: Tensor) -> float:
        return float(_sum(_largest(self.grouped(order, groups).sum(1), self._n, 1)).sum())

    def gains(self, order: Tensor, groups: Tensor) -> Tensor:
        grouped = self.grouped(order, groups)
        together = grouped.sum(1, keepdim=True)
        now = _sum(_largest(together, self._n, 2).flatten(1))
        rest = (together - grouped).flatten(0, 1)
        # One place at a time: each is compared with every channel.
        kept = [_largest(self.scores + one, self._n, 1).sum(-1) for one in rest]
        return torch.stack(kept).view(*grouped.shape[:2], -1) - now[:, None, None]


class Search:
    """The order of channels that keeps most of what its terms score.

    Args:
        terms: with the same channels and width.
        parts: int `[channels]`: channels change places within their part alone.
    """

    def __init__(self, terms: Sequence[Term], parts: Tensor | None = None) -> None:
        self.terms = terms
        self.channels, self._width = terms[0].channels, terms[0].width
        self._device = terms[0].scores.device
        self._start = torch.arange(self.channels, device=self._device)
        self._all = _all(self._start, self._width)
        self._apart: Tensor | None = None
        if parts is not None:
            own = parts.to(self._device)
            self._apart = own[:, None] != own

    def kept(self, order: Tensor) -> float:
        """The sum of the scores that stay in this order."""
        return sum(term.kept(order, self._all) for term in self.terms)

    def run(self, rounds: int) -> Tensor:
        """The order found after at most so many rounds of swaps, and of cycles after them."""
        order, touched = self._start, self._all
        near = torch.zeros(self.channels, self.channels, device=self._device)
        local = all(term.local for term in self.terms)
        numbers = torch.Generator().manual_seed(0)
        tries, most = 0, _ESCAPES if local else 0
        for _ in range(rounds):
            self._fill(near, order, touched, local=True)
            gains = near
            if not local:
                gains = near.clone()
                self._fill(gains, order, self._all, local=False)
            better = self._by_swaps(order, gains) if tries in (0, most) else None
            while better is None and tries < most:
                tries += 1
                better = self._by_cycles(order, gains, numbers)
            if better is None and tries == most:
                better = self._by_swaps(order, gains)
            if better is None:
                break
            order, touched = better
        return order

    def _by_swaps(self, order: Tensor, gains: Tensor) -> tuple[Tensor, Tensor] | None:
        """A better order and the groups that differ: pairs of places change channels."""
        swaps = list(self._swaps(gains[:, order]))
        while swaps:
            trial = order.clone()
            for place, other in swaps:
                trial[place], trial[other] = order[other], order[place]
            touched = self._groups_of([place for swap in swaps for place in swap])
            if self._rise(order, trial, touched) > 0:
                return trial, touched
            # Rounding, or too many blocks at once that were the least one kept.
            swaps = swaps[: len(swaps) // 2]
        return None

    def _by_cycles(
        self, order: Tensor, gains: Tensor, numbers: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """The same by longer cycles, through one place of each group: where no swap gains."""
        drawn = torch.randint(self._width, (len(self._all),), generator=numbers)
        places = self._all * self._width + drawn.to(self._device)
        places = places[places < self.channels]
        if len(places) < 2:
            return None
        between = gains[places[:, None], order[places]]
        if self._apart is not None:
            between.masked_fill_(self._apart[places[:, None], places], -torch.inf)
        taken = best_cycles(between)
        moved = taken != torch.arange(len(taken), device=self._device)
        trial = order.clone()
        trial[places] = order[places[taken]]
        touched = self._groups_of(places[moved].tolist())
        return (trial, touched) if self._rise(order, trial, touched) > 0 else None

    def _fill(self, gains: Tensor, order: Tensor, groups: Tensor, local: bool) -> None:
        """Row p of the gains: what p's group gains with channel c in place p, for every c."""
        inside = torch.arange(self._width, device=self._device)
        places = (groups[:, None] * self._width + inside).flatten()
        real = places < self.channels
        found = [term.gains(order, groups) for term in self.terms if term.local == local]
        if found:
            total = functools.reduce(torch.add, found).flatten(0, 1)[real].to(gains.dtype)
            if local:
                gains[places[real]] = total
            else:
                gains[places[real]] += total

    def _rise(self, order: Tensor, trial: Tensor, touched: Tensor) -> float:
        return sum(term.kept(trial, touched) - term.kept(order, touched) for term in self.terms)

    def _groups_of(self, places: Sequence[int]) -> Tensor:
        groups = sorted({place // self._width for place in places})
        return torch.as_tensor(groups, dtype=torch.int64, device=self._device)

    def _swaps(self, gains: Tensor) -> Iterator[tuple[int, int]]:
        """Pairs of places to swap, the best first, no group twice. `gains` is place by place."""
        width, groups = self._width, len(self._all)
        missing = groups * width - self.channels
        both = gains + gains.t()
        if self._apart is not None:
            both.masked_fill_(self._apart, -torch.inf)
        if missing:
            both = F.pad(both, (0, missing, 0, missing), value=-torch.inf)
        by_group = both.view(groups, width, groups, width)
        best = by_group.amax((1, 3))
        best = best.masked_fill(torch.ones_like(best, dtype=torch.bool).tril(), 0)
        values, pairs = best.flatten().topk(min(best.numel(), _CANDIDATES * groups))
        used: set[int] = set()
        for value, pair in zip(values.tolist(), pairs.tolist(), strict=True):
            if value <= 0:
                return
            first, second = divmod(pair, groups)
            if first not in used and second not in used:
                used |= {first, second}
                here, there = divmod(int(by_group[first, :, second].argmax()), width)
                yield first * width + here, second * width + there


def best_cycles(gains: Tensor) -> Tensor:
    """Exchanges around cycles, each with a gain.

    Bellman-Ford: where the best ways to pass channels on close to a cycle, that cycle gains.

    Args:
        gains: `[n, n]`, of place i with the channel of place j; -inf where it may not have it.

    Returns:
        `[n]`, the place whose channel each place takes.
    """
    taken = torch.arange(len(gains), device=gains.device)
    least = 1e-6 * float(gains.masked_fill(gains.isinf(), 0).abs().amax())
    while (following := _cycle(gains, taken, least)) is not None:
        taken = taken[following]
    return taken


def _cycle(gains: Tensor, taken: Tensor, least: float) -> Tensor | None:
    """The successors of all places, themselves off the cycles; None without a cycle."""
    here = torch.arange(len(taken), device=taken.device)
    gain = gains[:, taken] - gains[here, taken][:, None]
    best = gains.new_zeros(len(taken))
    successor = here.clone()
    for _ in range(_LONGEST):
        value, source = (gain + best).max(1)
        better = value > best + least
        if not better.any():
            return None
        best = torch.where(better, value, best)
        successor = torch.where(better, source, successor)
        ahead = successor
        for _ in range(len(taken).bit_length()):  # whoever walks on ends up on a cycle
            ahead = ahead[ahead]
        on_cycle = torch.zeros_like(better)
        on_cycle[ahead] = True
        on_cycle &= successor != here
        if on_cycle.any():
            return torch.where(on_cycle, successor, here)
    return None


def rows_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """Scores `[rows, channels]`: the rows of each tap, those that are decided together added up."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    score = weight.detach().to(dtype).abs()
    by_tap = score.reshape(*score.shape[:2], -1).permute(2, 0, 1)
    tile = pattern.row_tile
    padded = F.pad(by_tap, (0, 0, 0, -by_tap.shape[1] % tile))
    return padded.unflatten(1, (-1, tile)).sum(2).flatten(0, 1)


def column_terms(scores: Sequence[Tensor], pattern: NM | BlockSparse, step: int = 1) -> list[Term]:
    """The terms of the columns of several weights.

    Args:
        scores: `[rows, channels]` each, as `rows_of` gives them.
        pattern: which they follow.
        step: looks at every step-th row alone.
    """
    if isinstance(pattern, NM):
        return [Columns(torch.cat([one[::step] for one in scores]).t(), pattern)]
    terms: list[Term] = []
    for one in scores:
        rows = one[::step]
        kept = pattern.blocks_kept(len(rows) * pattern.row_tile, one.shape[1])
        terms.append(Blocks(rows.t(), pattern.k_tile, kept))
    return terms


def _all(order: Tensor, width: int) -> Tensor:
    return torch.arange(-(-len(order) // width), device=order.device)


def _largest(values: Tensor, count: int, dim: int) -> Tensor:
    """The sum of the largest values along a dimension."""
    if count == 1:
        return values.amax(dim)
    if count == 2 and values.shape[dim] == 4:  # a small network, several times faster than topk
        a, b, c, d = values.unbind(dim)
        high, other = torch.maximum(a, b), torch.maximum(c, d)
        low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        return torch.maximum(high, other) + torch.maximum(torch.minimum(high, other), low)
    return values.topk(count, dim).values.sum(dim)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64)
