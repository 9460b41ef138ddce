"""The units of a pattern: the sets of weights that it keeps or drops whole, and who competes.

N:M: a unit is one column of `vector` rows, and the M units of a group compete for N places.
Blocks: a unit is a block, and all blocks of the matrix compete. Units that compete are a *pool*:
a row of the tensors `[pools, units]` that everything here is about. Methods written in units and
pools serve every pattern, and cannot leave it.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.patterns import NM, BlockSparse, Pattern
from sparsekit.prune.layers import Layer


class Units:
    """A layer's weight as the units of a pattern.

    Args:
        layer: whose weight is meant.
        pattern: N:M or blocks.

    Attributes:
        real: bool `[pools, units]`, False where padding made up a unit.
        kept: how many units of each pool the pattern keeps.
        density: which fraction that is.

    Raises:
        ValueError: another kind of pattern.
    """

    def __init__(self, layer: Layer, pattern: Pattern) -> None:
        if not isinstance(pattern, NM | BlockSparse):
            raise ValueError(f"units: expected an N:M or block pattern, got {pattern}")
        self._layer = layer
        self._pattern = pattern
        weight = layer.weight.detach()
        self._shape = layer.matrices(weight, pattern).shape
        self.real = self.any(torch.ones_like(weight, dtype=torch.bool))
        _, n, k = self._shape
        self.kept = pattern.n if isinstance(pattern, NM) else pattern.blocks_kept(n, k)
        self.density = self.kept / self.real.shape[1]

    @cached_property
    def sizes(self) -> Tensor:
        """How many weights each unit holds, `[pools, units]`."""
        return self.sums(torch.ones_like(self._layer.weight.detach(), dtype=torch.float32))

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each unit, `[pools, units]`, of values in the weight's shape."""
        rows, columns = self._pattern.row_tile, self._pattern.k_tile
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        matrices = self._layer.matrices(values, self._pattern)
        _, n, k = matrices.shape
        padded = F.pad(matrices, (0, -k % columns, 0, -n % rows))
        tiles = padded.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).sum(2)
        return tiles.flatten(0, 2) if isinstance(self._pattern, NM) else tiles.sum(3).flatten(1)

    def spread(self, units: Tensor) -> Tensor:
        """A number or bool of each unit, at each of its weights: the weight's shape."""
        groups, n, k = self._shape
        rows, columns = self._pattern.row_tile, self._pattern.k_tile
        wide = units.reshape(groups, -(-n // rows), -1)
        if not isinstance(self._pattern, NM):
            wide = wide.repeat_interleave(columns, 2)
        return self._layer.from_matrices(wide.repeat_interleave(rows, 1)[:, :n, :k])

    def any(self, mask: Tensor) -> Tensor:
        """Which units hold a True of a mask in the weight's shape."""
        return self.sums(mask.to(torch.float32)) > 0

    def keep(self, score: Tensor) -> Tensor:
        """The units that the pattern keeps: the best-scored of each pool, of equals the first."""
        return (ranks(score.masked_fill(~self.real, -torch.inf)) < self.kept) & self.real

    def keep_partly(self, score: Tensor, share: float) -> Tensor:
        """On the way to `keep`: of the units that it drops only a share go, the lowest-scored.

        Between dense and N:M a group has no density of its own worth speaking of, and blocks
        compete across the matrix. Both are served by the same rule, which ends at the pattern's
        mask when the share is 1 and drops in order of the score over the whole layer before.
        """
        doomed = ~self.keep(score) & self.real
        count = round(share * int(doomed.sum()))
        order = score.masked_fill(~doomed, torch.inf).flatten().argsort(stable=True)
        gone = torch.zeros_like(doomed).flatten()
        gone[order[:count]] = True
        return self.real & ~gone.view_as(doomed)


def ranks(score: Tensor) -> Tensor:
    """The place of each unit in its pool, 0 for the highest score; of equals the first is ahead."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
