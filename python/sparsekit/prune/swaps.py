"""The search behind `find_permutation`: swaps of channels between the groups of a pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.patterns import NM, BlockSparse, Pattern

# Of all pairs of groups, so many times the number of groups are candidates in one round.
_CANDIDATES = 8


class Search:
    """Scores of the channels, and the order of channels that keeps most of them.

    A *place* is a position in the order; places are cut into the pattern's groups (of M, or of the
    columns of a block). Both families come down to one sum. When a group gives up the channel at
    place p for channel c, what it then keeps is `base[p] + Σ relu(score[c] - level[p])` over rows:

    - N:M: `level` is the N-th largest of the group's other values, `base` the sum of the N largest.
    - Blocks: `level` is what the other channels lack to the least block that is kept, `base` is 0.
      Exact while that least block stays the same, and never too little.

    Σ relu(a - b) = (Σ|a - b| + Σ(a - b)) / 2, so a matrix of L1 distances has the gain of every
    swap. Swaps that share no group add up, so that a round can take many.

    Args:
        weights: `[n, channels, ...]` each; their absolute values count.
        pattern: NM or BlockSparse.
        rows: most rows to look at, None for all.
    """

    def __init__(self, weights: Sequence[Tensor], pattern: NM | BlockSparse, rows: int | None):
        scores = [_rows(weight, pattern) for weight in weights]
        total = sum(len(part) for part in scores)
        step = 1 if rows is None else -(-total // rows)
        scores = [part[::step] for part in scores]
        self._scores = torch.cat(scores).t().contiguous()  # [channels, rows]
        self._sums = _sum(self._scores)
        self._pattern = pattern
        self._width = pattern.k_tile
        self.channels = len(self._scores)
        self._groups = -(-self.channels // self._width)
        # Each weight ranks its own blocks.
        self._ranked: list[tuple[slice, int]] = []
        if isinstance(pattern, BlockSparse):
            start = 0
            for part in scores:
                kept = pattern.blocks_kept(len(part) * pattern.row_tile, self._groups * self._width)
                self._ranked.append((slice(start, start + len(part)), kept))
                start += len(part)

    def kept(self, order: Tensor) -> float:
        """The sum of the scores that stay in this order."""
        grouped = self._grouped(order, range(self._groups))
        if isinstance(self._pattern, NM):
            return float(grouped.topk(self._pattern.n, 1).values.sum(dtype=torch.float64))
        sums = grouped.sum(1)
        tops = [sums[:, rows].flatten().topk(count).values for rows, count in self._ranked]
        return sum(float(top.sum(dtype=torch.float64)) for top in tops)

    def run(self, rounds: int) -> Tensor:
        """The order found after at most so many rounds of swaps."""
        order = torch.arange(self.channels, device=self._scores.device)
        kept = self.kept(order)
        gains = self._scores.new_empty(self.channels, self.channels)
        stale: Sequence[int] = range(self._groups)
        for _ in range(rounds):
            self._update(gains, order, stale)
            swaps = list(self._swaps(gains[:, order]))
            while swaps:
                trial = order.clone()
                for place, other in swaps:
                    trial[place], trial[other] = order[other], order[place]
                value = self.kept(trial)
                if value > kept:
                    break
                # Rounding, or too many blocks at once that were the least one kept.
                swaps = swaps[: len(swaps) // 2]
            if not swaps:
                break
            order, kept = trial, value
            if isinstance(self._pattern, NM):
                stale = sorted({place // self._width for swap in swaps for place in swap})
        return order

    def _grouped(self, order: Tensor, groups: Sequence[int]) -> Tensor:
        """Scores `[groups, width, rows]`; what the last group lacks is zero."""
        missing = self._groups * self._width - self.channels
        places = F.pad(order, (0, missing), value=-1).view(self._groups, self._width)
        places = places[torch.as_tensor(groups, device=order.device)]
        return self._scores[places].masked_fill_((places < 0)[..., None], 0)

    def _update(self, gains: Tensor, order: Tensor, groups: Sequence[int]) -> None:
        """Row p of the gains: what p's group gains with channel c in place p, for every c."""
        base, level, now = self._levels(self._grouped(order, groups))
        first = torch.as_tensor(groups, device=order.device)[:, None] * self._width
        places = (first + torch.arange(self._width, device=order.device)).flatten()
        real = places < self.channels
        level = level.flatten(0, 1)[real]
        gain = (base - now[:, None]).flatten()[real]
        far = torch.cdist(level, self._scores, p=1.0)
        above = (far + self._sums - _sum(level)[:, None]) / 2
        gains[places[real]] = (gain[:, None] + above).to(gains.dtype)

    def _levels(self, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`base [groups, width]`, `level [groups, width, rows]`, and what groups keep now."""
        if isinstance(self._pattern, NM):
            n = self._pattern.n
            best = grouped.topk(n + 1, 1).values
            least, following = best[:, n - 1 : n], best[:, n:]
            level = torch.where(grouped >= least, following, least)
            kept = best[:, :n].sum(1, keepdim=True)
            base = kept - (grouped - following).clamp(min=0).where(grouped >= least, 0)
            return _sum(base), level, _sum(kept.squeeze(1))
        sums = grouped.sum(1, keepdim=True)
        least = torch.empty_like(sums[:1])
        for rows, count in self._ranked:
            top = sums[..., rows].flatten().topk(count).values
            least[..., rows] = top[-1] if count else torch.inf
        level = least - (sums - grouped)
        return _sum(torch.zeros_like(grouped)), level, _sum((sums - least).clamp(min=0).squeeze(1))

    def _swaps(self, gains: Tensor) -> Iterator[tuple[int, int]]:
        """Pairs of places to swap, the best first, no group twice. `gains` is place by place."""
        width, groups = self._width, self._groups
        missing = groups * width - self.channels
        both = F.pad(gains + gains.t(), (0, missing, 0, missing), value=-torch.inf)
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


def _rows(weight: Tensor, pattern: Pattern) -> Tensor:
    """Scores `[rows, channels]`: the rows of each tap, those that are decided together added up."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    score = weight.detach().to(dtype).abs()
    by_tap = score.reshape(*score.shape[:2], -1).permute(2, 0, 1)
    tile = pattern.row_tile
    padded = F.pad(by_tap, (0, 0, 0, -by_tap.shape[1] % tile))
    return padded.unflatten(1, (-1, tile)).sum(2).flatten(0, 1)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64)
