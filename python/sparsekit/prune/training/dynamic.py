"""Dynamic sparse training: as sparse at the first step as at the last, while the mask moves."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sparsekit.prune.training.base import SparseLayer, TrainingMethod, Window, same_random
from sparsekit.prune.training.units import ranks


class Dynamic(TrainingMethod):
    """Starts from a random mask of the pattern; from time to time swaps the least kept units.

    At an update, a fraction of a layer's kept units, those of lowest magnitude, are dropped, and
    every pool regrows as many as it lost: blocks are swapped within their matrix, N:M positions
    within their group. A unit that is dropped and regrown at once is left as it was; one that is
    new starts at zero with cleared momentum.

    Args:
        drop: fraction dropped at the first update; it falls to zero along a cosine.
        every: steps between updates; None means a fiftieth of those from `start` to `end`, at most
            the 100 that the paper on RigL found good.
        start: share of the steps before the first update.
        end: share of the steps after which the mask stays.
        seed: of the first mask, and of what SET grows.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        optimizer: Optimizer,
        steps: int,
        *,
        drop: float = 0.3,
        every: int | None = None,
        start: float = 0.0,
        end: float = 0.75,
        seed: int = 0,
    ) -> None:
        if every is None:
            every = min(100, max(1, round((end - start) * steps / 50)))
        super().__init__(layers, optimizer, Window.of(steps, every, start, end))
        if not 0.0 < drop <= 1.0:
            raise ValueError(f"train_sparse: drop must be above 0 and at most 1, got {drop}")
        self.drop = drop
        self.seed = seed

    def begin(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.keep(layer.units.keep(self._random(layer, 0, index)))
            layer.hold()

    def before_step(self, step: int) -> None:
        # In a step of its own in the paper; here the gradients at hand move the weights as well.
        if self.window.due(step):
            for index, layer in enumerate(self.layers):
                self._swap(layer, step, index)

    def after_step(self, step: int) -> None:
        for layer in self.layers:
            layer.hold()

    def settle(self) -> None:
        """The mask stays as it is."""

    @abstractmethod
    def _grow_score(self, layer: SparseLayer, step: int, index: int) -> Tensor:
        """Which units to grow, `[pools, units]`, higher first."""

    def _swap(self, layer: SparseLayer, step: int, index: int) -> None:
        units = layer.units
        kept = units.any(layer.mask)
        grow_score = self._grow_score(layer, step, index)
        fraction = self.drop / 2 * (1.0 + math.cos(math.pi * self.window.progress(step)))
        count = round(fraction * int(kept.sum()))
        lowest = layer.magnitude().masked_fill(~kept, torch.inf).flatten().argsort(stable=True)
        dropped = torch.zeros_like(kept).flatten()
        dropped[lowest[:count]] = True
        staying = kept & ~dropped.view_as(kept)

        lost = (kept & ~staying).sum(1, keepdim=True)
        free = grow_score.masked_fill(staying | ~units.real, -torch.inf)
        new = staying | (ranks(free) < lost)
        layer.keep(new)
        unchanged = units.spread(kept & new)
        layer.weight.masked_fill_(~unchanged, 0)
        if layer.weight.grad is not None:
            layer.weight.grad.masked_fill_(~layer.mask, 0)
        for value in self.optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                value.masked_fill_(~unchanged, 0)

    def _random(self, layer: SparseLayer, step: int, index: int) -> Tensor:
        generator = same_random(self.seed, step, index)
        return torch.rand(layer.units.real.shape, generator=generator).to(layer.weight.device)


class RigL(Dynamic):
    """Evci et al. 2020, arXiv 1911.11134: regrows where the dense gradient is largest.

    Swaps are as described in `Dynamic`. Trains from scratch, or further, at the pattern's cost in
    memory and arithmetic but for one dense gradient per update. The paper gives large layers more
    of the sparsity (ERK): pass such a mapping as the pattern.
    """

    def dense_gradients(self, step: int) -> bool:
        return self.window.due(step)

    def _grow_score(self, layer: SparseLayer, step: int, index: int) -> Tensor:
        return layer.gradient()


class SET(Dynamic):
    """Mocanu et al. 2018 (Nature Communications 9, arXiv 1707.04780): regrows at random.

    Swaps are as described in `Dynamic`. Never needs a dense gradient.
    """

    def _grow_score(self, layer: SparseLayer, step: int, index: int) -> Tensor:
        return self._random(layer, step, index)
