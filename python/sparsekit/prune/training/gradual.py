"""Gradual magnitude pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim.optimizer import Optimizer

from sparsekit.prune.training.base import SparseLayer, TrainingMethod, Window


class Gradual(TrainingMethod):
    """Zhu & Gupta 2017, arXiv 1710.01878: prune a little, train, prune a little more.

    Every `every` steps the weights of lowest magnitude go, until a share 1 - (1 - t)³ of all that
    shall go is gone, where t is the progress from `start` to `end`: fast while there is much that
    nobody misses, slowly towards the end. What is gone stays gone. Every layer follows the curve by
    itself.

    For blocks the sparsity itself rises along the curve. A group of N:M has no density to speak of
    between dense and N of M, so the layer has one: of the weights that the N:M mask drops today,
    that share goes, lowest magnitude first. No group is ever sparser than N of M.

    Needs a trained model (or trains one) and costs next to nothing: one ranking per update.

    Args:
        every: steps between updates.
        start: share of the steps before the first weight goes.
        end: share of the steps after which the pattern is reached; the rest is fine-tuning.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        optimizer: Optimizer,
        steps: int,
        *,
        every: int = 10,
        start: float = 0.0,
        end: float = 0.75,
    ) -> None:
        super().__init__(layers, optimizer, Window.of(steps, every, start, end))

    def after_step(self, step: int) -> None:
        if self.window.due(step):
            self._prune(1.0 - (1.0 - self.window.progress(step)) ** 3)
        for layer in self.layers:
            layer.hold()

    def settle(self) -> None:
        self._prune(1.0)

    def _prune(self, share: float) -> None:
        for layer in self.layers:
            score = layer.magnitude().masked_fill(~layer.units.any(layer.mask), -1)
            layer.keep(layer.units.keep_partly(score, share))
