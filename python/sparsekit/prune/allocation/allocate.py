"""Allocation: how the density of a pattern is spread over the layers that share it.

An allocation says which density each layer shall have; together they then keep as much as the
pattern itself would, counted in its tiles: blocks, or vectors of an N:M pattern. Blocks meet that
to the block. N:M has few steps, n of m, so that less than one step of a layer may be left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sparsekit.patterns import NM, BlockSparse, Pattern, at_density, parse_pattern
from sparsekit.prune.allocation.scan import SCAN_BATCHES, SensitivityReport, scan
from sparsekit.prune.calibration import Batch, Calibration
from sparsekit.prune.distributed import ALONE, Ranks
from sparsekit.prune.layers import Layer
from sparsekit.prune.layerwise import PruneLayer
from sparsekit.prune.methods import Method
from sparsekit.prune.reconstruct import ReconstructionOptions, bind, score_groups

_UNSTRUCTURED = BlockSparse((1, 1))


@dataclass(frozen=True)
class DenseModel:
    """A model before it is pruned, and how it is going to be.

    Attributes:
        model: every weight is as it was.
        batches: calibration, or None.
        name: of the method.
        method: its score, and what that needs.
        options: of the reconstruction.
        prune_layer: prunes one layer in place, by the method.
        statistics: layer name -> what the method found beforehand.
        cache_bytes: as for `prune`.
        pixels: as for `prune`.
        progress: show progress bars.
        ranks: the processes that share the calibration.
    """

    model: nn.Module
    batches: Sequence[Batch] | None
    name: str
    method: Method
    options: ReconstructionOptions
    prune_layer: PruneLayer
    statistics: Mapping[str, Tensor]
    cache_bytes: int
    pixels: int
    progress: bool
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Budget:
    """Layers that share a pattern, and what an allocation may ask of them.

    A layer's density is `step / steps`. One step keeps `tiles` tiles: one block, or one more of
    every m values.

    Attributes:
        dense: the model.
        pattern: the one they share.
        layers: in the model's order.
    """

    dense: DenseModel
    pattern: Pattern
    layers: Sequence[Layer]

    @cached_property
    def _grids(self) -> list[tuple[int, int]]:
        """Tiles down and across each layer's matrix, of all its groups."""
        grids = []
        for layer in self.layers:
            empty = torch.empty(layer.weight.shape, device="meta")
            groups, rows, columns = layer.matrices(empty, self.pattern).shape
            down = -(-groups * rows // self.pattern.row_tile)
            grids.append((down, -(-columns // self.pattern.k_tile)))
        return grids

    @property
    def steps(self) -> list[int]:
        """The step at which each layer keeps everything."""
        if isinstance(self.pattern, NM):
            return [self.pattern.m for _ in self.layers]
        return [down * across for down, across in self._grids]

    @property
    def tiles(self) -> list[int]:
        """Tiles in one step of each layer."""
        if isinstance(self.pattern, NM):
            return [down * across for down, across in self._grids]
        return [1 for _ in self.layers]

    @property
    def sizes(self) -> list[int]:
        """Tiles of each layer."""
        return [steps * tiles for steps, tiles in zip(self.steps, self.tiles, strict=True)]

    @cached_property
    def kept(self) -> int:
        """Tiles that the layers keep together."""
        if isinstance(self.pattern, NM):
            return sum(self.pattern.n * tiles for tiles in self.tiles)
        assert isinstance(self.pattern, BlockSparse)
        height, width = self.pattern.block_shape
        return sum(self.pattern.blocks_kept(d * height, a * width) for d, a in self._grids)

    @property
    def density(self) -> float:
        """Share of all tiles that is kept."""
        return self.kept / sum(self.sizes)

    def moments(self, what: str) -> Iterator[tuple[Layer, Tensor]]:
        """Each layer with the second moments `[groups, k, k]` of its inputs in the dense model.

        Layers that no batch runs are left out. One moment is in memory at a time.

        Args:
            what: who needs them, for the error.

        Raises:
            ValueError: no calibration.
        """
        dense = self.dense
        with Calibration(
            dense.model,
            self.batches(what),
            self.layers,
            dense.cache_bytes,
            dense.pixels,
            dense.ranks,
        ) as calibration:
            for group in calibration.groups:
                moments = calibration.moments(group)
                for layer in group.layers:
                    yield layer, moments
                calibration.done(group)

    def batches(self, what: str) -> Sequence[Batch]:
        """The calibration.

        Raises:
            ValueError: there is none.
        """
        if self.dense.batches is None:
            raise ValueError(
                f"prune: allocation {what} needs calibration data; pass calibration=batches, or "
                "take an allocation that does without: 'uniform', 'erk' or 'lamp'"
            )
        return self.dense.batches

    def tile_scores(self, score: Tensor) -> Tensor:
        """Sums of a score `[groups, n, k]` over the pattern's tiles, flat, on the CPU.

        Of N:M, a tile is one column of a vector. As many as the layer's size: what a tile has
        beyond the edge counts as 0.
        """
        matrix = score.flatten(0, 1)
        down, across = self.pattern.row_tile, self.pattern.k_tile
        rows, columns = matrix.shape
        padded = nn.functional.pad(matrix, (0, -columns % across, 0, -rows % down))
        if isinstance(self.pattern, NM):
            across = 1
        tiles = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
        return tiles.sum((1, 3)).flatten().cpu()

    def weight(self, layer: Layer, pattern: Pattern | None = None) -> Tensor:
        """A layer's matrices `[groups, n, k]` for a pattern, by default the budget's own."""
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        return layer.matrices(layer.weight.to(dtype), pattern or self.pattern)

    def by_largest(self, scores: Mapping[str, Tensor]) -> list[float]:
        """Densities when the best-scored tiles of all layers are kept; of equals, the earlier.

        Args:
            scores: layer name -> a score for each tile, flat. Layers without one get the average.
        """
        known = [layer.name for layer in self.layers if layer.name in scores]
        if not known:
            return uniform(self)
        sizes = dict(zip([layer.name for layer in self.layers], self.sizes, strict=True))
        everything = torch.cat([scores[name] for name in known])
        left = round(self.density * len(everything))
        threshold = everything.kthvalue(max(1, len(everything) - left + 1)).values
        better = {name: int((scores[name] > threshold).sum()) for name in known}
        left -= sum(better.values())
        out = {layer.name: self.density for layer in self.layers}
        for name in known:
            equal = min(left, int((scores[name] == threshold).sum()))
            left -= equal
            out[name] = (better[name] + equal) / sizes[name]
        return list(out.values())


Allocation: TypeAlias = Callable[[Budget], Sequence[float]]
"""A density from 0 to 1 for each layer of a budget; `allocate` makes them meet it."""


def uniform(budget: Budget) -> list[float]:
    """Every layer gets the pattern as it is."""
    return [budget.density for _ in budget.layers]


def erk(budget: Budget) -> list[float]:
    """Erdős–Rényi-Kernel: density in proportion to (n + k + kernel sizes) / (their product).

    Small and thin layers keep more. Mocanu et al. 2018 (Nature Communications 9, 2383) for linear
    layers, Evci et al. 2020 (arXiv 1911.11134) for convolutions. Needs no data. A layer that would
    keep more than everything stays dense, and the others share what it leaves.
    """
    densities = [sum(layer.weight.shape) / layer.weight.numel() for layer in budget.layers]
    # Relative to each other only.
    return [density / max(densities) for density in densities]


def global_threshold(budget: Budget) -> list[float]:
    """One threshold on the method's score for the tiles of all layers.

    Nothing is normalised: with "magnitude", a layer whose weights are small as a whole loses most
    of them, for which "lamp" makes up. Scores of methods that use calibration data are taken from
    the dense model, at the price of one more pass of calibration. Memory: a float for each tile.
    """
    dense = budget.dense
    each: Iterator[tuple[Layer, Tensor | None]]
    if dense.method.reads_inputs:
        each = budget.moments("'global' with this method")
    else:
        each = ((layer, None) for layer in budget.layers)
    scores = {}
    for layer, moments in each:
        weight = budget.weight(layer)
        per_group: Sequence[Tensor | None] = [None] * len(weight)
        if moments is not None:
            per_group = list(layer.pad_moments(moments, budget.pattern))
        statistic = dense.statistics.get(layer.name)
        if statistic is not None:
            statistic = layer.matrices(statistic.to(weight.device), budget.pattern)
        ranks = bind(dense.method.score, statistic, len(weight))
        found = score_groups(weight, ranks, per_group, dense.options)
        scores[layer.name] = budget.tile_scores(found)
    return budget.by_largest(scores)


def lamp(budget: Budget) -> list[float]:
    """Layer-adaptive magnitude (LAMP), Lee et al. 2021 (arXiv 2010.07611).

    A tile's sum of squares over the sum of all tiles of its layer that are at least as large; one
    threshold on that for all layers. Of each layer the largest tile always stays. Needs no data
    and is the same for every method. Memory: a float for each tile.
    """
    scores = {}
    for layer in budget.layers:
        energy = budget.tile_scores(budget.weight(layer).square())
        ordered, order = energy.double().sort(descending=True)
        shares = ordered / ordered.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
        scores[layer.name] = torch.empty_like(shares).scatter_(0, order, shares)
    return budget.by_largest(scores)


@dataclass(frozen=True)
class OWL:
    """Outlier-weighed layerwise sparsity, Yin et al. 2024 (arXiv 2310.05175).

    A block of the model (an element of a `ModuleList` or `Sequential`; a layer by itself where it
    is in none) keeps the more, the larger the share of its `|weight| · ‖input‖` that exceeds
    `outliers` times their mean. Made for large language models, whose few huge features carry much
    of the accuracy. Needs calibration data and one more pass of calibration; memory: a float for
    each weight of a block.

    Attributes:
        outliers: M of the paper.
        spread: λ of the paper: densities differ by at most twice this, before a layer is full.
    """

    outliers: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not self.outliers > 0:
            raise ValueError(f"OWL: outliers must be greater than 0, got {self.outliers}")
        if not 0.0 <= self.spread <= 0.5:
            raise ValueError(f"OWL: spread must be from 0 to 0.5, got {self.spread}")

    def __call__(self, budget: Budget) -> list[float]:
        blocks = {layer.name: _block(budget.dense.model, layer) for layer in budget.layers}
        waiting: dict[nn.Module, list[Tensor]] = {}
        ratios: dict[nn.Module, float] = {}
        members = list(blocks.values())
        for layer, moments in budget.moments("'owl'"):
            norms = moments.diagonal(dim1=1, dim2=2).sqrt()
            weight = budget.weight(layer, _UNSTRUCTURED)
            block = blocks[layer.name]
            parts = waiting.setdefault(block, [])
            parts.append((weight.abs() * norms.unsqueeze(1)).flatten())
            if len(parts) == members.count(block):
                ratios[block] = self._ratio(waiting.pop(block))
        # Those of whose layers no batch runs some.
        ratios.update((block, self._ratio(parts)) for block, parts in waiting.items())
        low, high = min(ratios.values(), default=0.0), max(ratios.values(), default=0.0)
        if high == low:
            return uniform(budget)
        scale = 2 * self.spread / (high - low)
        above = {name: scale * (ratios.get(block, low) - low) for name, block in blocks.items()}
        sizes = budget.sizes
        mean = sum(a * size for a, size in zip(above.values(), sizes, strict=True)) / sum(sizes)
        return [min(1.0, max(0.0, budget.density + a - mean)) for a in above.values()]

    def _ratio(self, parts: Sequence[Tensor]) -> float:
        count = sum(part.numel() for part in parts)
        mean = sum(float(part.sum(dtype=torch.float64)) for part in parts) / count
        return sum(int((part > self.outliers * mean).sum()) for part in parts) / count


@dataclass(frozen=True)
class Sensitivity:
    """Keep most where a scan says that the model loses most.

    Takes the lower convex hull of each layer's losses over its density and raises densities where
    a tile gains most: what minimises the sum of the losses, as far as losses of single layers add
    up. Needs a report of `sparsekit.prune.sensitivity` with patterns of the same kind at several
    densities, or calibration data to make one: with 4 densities (all n of N:M) for each layer.

    Attributes:
        report: losses; None makes a scan.
    """

    report: SensitivityReport | None = None

    def __call__(self, budget: Budget) -> list[float]:
        report = self._scan(budget) if self.report is None else self.report
        curves = [_curve(report, layer.name, budget.pattern) for layer in budget.layers]
        densities = [curve[0][0] for curve in curves]
        left = budget.kept - sum(d * size for d, size in zip(densities, budget.sizes, strict=True))
        if left < -1e-9 * budget.kept:
            sparsest = budget.density - left / sum(budget.sizes)
            raise ValueError(
                f"prune: allocation 'sensitivity' has to keep {budget.density:.1%}, but the "
                f"sparsest patterns of its report keep {sparsest:.1%}; scan sparser ones as well"
            )
        gains = [
            ((before[1] - after[1]) / ((after[0] - before[0]) * size), index, after[0])
            for index, (curve, size) in enumerate(zip(curves, budget.sizes, strict=True))
            for before, after in pairwise(curve)
        ]
        # Along a convex curve the gains fall, so each layer's come in the order of its densities.
        for _, index, density in sorted(gains, key=lambda gain: -gain[0]):
            size = budget.sizes[index]
            rise = min(density - densities[index], max(0.0, left) / size)
            densities[index] += rise
            left -= rise * size
        return densities

    def _scan(self, budget: Budget) -> SensitivityReport:
        dense, density = budget.dense, 1.0 - budget.pattern.sparsity
        wanted = [density / 4, density / 2, density, (1 + density) / 2]
        if isinstance(budget.pattern, NM):
            wanted = [n / budget.pattern.m for n in range(1, budget.pattern.m)]
        patterns = [at_density(budget.pattern, each) for each in wanted]
        found = [pattern for pattern in patterns if pattern is not None]
        return scan(
            dense.model,
            {layer.name: (layer, found) for layer in budget.layers},
            dense.prune_layer,
            dense.name,
            budget.batches("'sensitivity'"),
            evaluate=None,
            needs_moments=True,
            distance="relative_mse",
            scan_batches=SCAN_BATCHES,
            cache_bytes=dense.cache_bytes,
            pixels=dense.pixels,
            progress=dense.progress,
        )


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "erk": erk,
    "global": global_threshold,
    "lamp": lamp,
    "owl": OWL(),
    "sensitivity": Sensitivity(),
}
"""Every allocation by name. Add one by writing a function of a `Budget` and a line here."""


def allocate(
    dense: DenseModel, chosen: Mapping[str, tuple[Layer, Pattern]], spread: Allocation
) -> dict[str, Pattern | None]:
    """Spread each pattern's density over the layers that have it.

    Args:
        dense: the model.
        chosen: layer name -> layer and pattern.
        spread: the allocation.

    Returns:
        Layer name -> its pattern; None where the layer keeps everything.

    Raises:
        ValueError: densities that are none, calibration missing, or a pattern that leaves nothing
            to spread.
    """
    given = {name: pattern for name, (_, pattern) in chosen.items()}
    if spread is uniform:
        return dict(given)
    out: dict[str, Pattern | None] = dict(given)
    for pattern in dict.fromkeys(given.values()):
        layers = [layer for layer, mine in chosen.values() if mine == pattern]
        if len(layers) == 1:
            continue
        budget = Budget(dense, pattern, layers)
        if budget.kept == sum(budget.sizes):
            continue
        _check_spread(budget)
        steps = fit(_densities(spread, budget), budget.steps, budget.tiles, budget.kept)
        for layer, step, most in zip(layers, steps, budget.steps, strict=True):
            out[layer.name] = at_density(pattern, step / most)
    return out


def find_allocation(allocation: str | Allocation) -> Allocation:
    """The function of that name, or the function itself.

    Raises:
        ValueError: unknown.
    """
    if callable(allocation):
        return allocation
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"prune: unknown allocation {allocation!r}; known are "
            f"{', '.join(sorted(ALLOCATIONS))}, or pass a function of a Budget"
        )
    return ALLOCATIONS[allocation]


def fit(
    densities: Sequence[float], steps: Sequence[int], tiles: Sequence[int], kept: int
) -> list[int]:
    """Whole steps of each layer that keep what the budget allows, near to the given densities.

    The densities are scaled by one common factor, with none above everything and none below one
    step; then each is cut to whole steps, and what that leaves goes to those that were cut most.

    Args:
        densities: from 0 to 1, in proportion.
        steps: at which a layer keeps everything.
        tiles: in one step of each layer.
        kept: tiles of all layers, at least one step of each.
    """
    wanted = [max(1.0, density * most) for density, most in zip(densities, steps, strict=True)]

    def scaled(factor: float) -> list[float]:
        return [
            min(float(most), max(1.0, factor * want))
            for want, most in zip(wanted, steps, strict=True)
        ]

    def total(counts: Sequence[float]) -> float:
        return sum(count * each for count, each in zip(counts, tiles, strict=True))

    low, high = 0.0, float(max(steps))
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if total(scaled(middle)) <= kept else (low, middle)
    exact = scaled(low)
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    left = kept - total(counts)
    for index in by_remainder:
        if counts[index] < steps[index] and tiles[index] <= left:
            counts[index] += 1
            left -= tiles[index]
    return counts


def _densities(spread: Allocation, budget: Budget) -> Sequence[float]:
    densities = spread(budget)
    if len(densities) != len(budget.layers) or not all(0.0 <= d <= 1.0 for d in densities):
        raise ValueError(
            f"prune: the allocation gave {list(densities)}; expected {len(budget.layers)} "
            "densities from 0 to 1, one for each layer"
        )
    return densities


def _check_spread(budget: Budget) -> None:
    pattern = budget.pattern
    if isinstance(pattern, NM) and pattern.n == 1:
        raise ValueError(
            f"prune: {pattern} leaves an allocation nothing to spread, because every layer keeps "
            f"at least 1 of {pattern.m}; take a pattern with n above 1, or allocation='uniform'"
        )
    if budget.kept < sum(budget.tiles):
        raise ValueError(
            f"prune: {pattern} keeps {budget.kept} blocks, and an allocation at least one in each "
            f"of {len(budget.layers)} layers; take a lower sparsity, or allocation='uniform'"
        )


def _block(model: nn.Module, layer: Layer) -> nn.Module:
    """The innermost element of a list that the layer is part of, or the layer itself."""
    module, block = layer.modules[0], layer.modules[0]
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for child in container:
                if child is not module and any(part is module for part in child.modules()):
                    block = child  # type: ignore[assignment]
    return block


def _kind(pattern: Pattern) -> tuple[int, ...]:
    """Equal for patterns that differ in nothing but their density."""
    if isinstance(pattern, NM):
        return (pattern.m, pattern.vector, 1)
    return (pattern.row_tile, pattern.k_tile)


def _curve(report: SensitivityReport, name: str, pattern: Pattern) -> list[tuple[float, float]]:
    """Density and loss of a layer along the lower convex hull, everything kept included."""
    if name in report.skipped:
        return [(1.0 - pattern.sparsity, 0.0)]
    points = [(1.0, 0.0)]
    for row in report.rows:
        if row.layer == name:
            mine = parse_pattern(row.pattern)
            if _kind(mine) == _kind(pattern):
                points.append((1.0 - mine.sparsity, row.loss))
    if len(points) == 1:
        raise ValueError(
            f"prune: allocation 'sensitivity' finds no pattern of the kind of {pattern} for layer "
            f"{name!r} in its report; scan this layer with several densities of it"
        )
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull
