"""Group lasso: a regulariser that drives whole groups of weights to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.optim.optimizer import Optimizer

from sparsekit.prune.training.base import SparseLayer, TrainingMethod, Window


class GroupLasso(TrainingMethod):
    """Wen et al. 2016, arXiv 1608.03665: a penalty λ · Σ √size · ‖group‖ on groups of weights.

    Applied as its proximal operator after each optimizer step (Yuan & Lin 2006): the norm of every
    group shrinks by lr · λ · √size, and is exactly zero when that is more than there is. As a
    penalty in the loss it would only circle around zero, and adaptive optimizers would rescale it.

    A group is a block, or a position of N:M. By default only those shrink that the pattern's
    magnitude mask would drop as things stand: the pattern is what they converge to, however strong
    the push. At `end` the weights are pruned to the pattern by magnitude; what is zero goes first,
    and what is not yet zero is what too small a `strength` leaves pruning to lose.

    Trains a dense model; costs a pass over the weights and a ranking per update.

    Args:
        strength: λ. With SGD, whose steps follow the gradient's size, 0.01 is a strong push; with
            Adam, whose steps do not, a weaker one than 0.3 is hardly felt.
        groups: "dropped" as described; "all" shrinks every block or position, as in the paper, and
            too strong a push empties the layer; "filters" shrinks whole rows of the matrix (output
            features, filters), whatever the pattern is.
        every: steps between shrinkings, each of which makes up for all of them.
        start: share of the steps before the first one.
        end: share of the steps after which the model is pruned.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        optimizer: Optimizer,
        steps: int,
        *,
        strength: float = 1e-2,
        groups: Literal["dropped", "all", "filters"] = "dropped",
        every: int = 1,
        start: float = 0.0,
        end: float = 0.75,
    ) -> None:
        super().__init__(layers, optimizer, Window.of(steps, every, start, end))
        if not strength > 0.0:
            raise ValueError(f"train_sparse: strength must be above 0, got {strength}")
        if groups not in ("dropped", "all", "filters"):
            raise ValueError(
                f"train_sparse: groups must be 'dropped', 'all' or 'filters', got {groups!r}"
            )
        self.strength = strength
        self.groups = groups

    def dense_gradients(self, step: int) -> bool:
        return step <= self.window.last

    def after_step(self, step: int) -> None:
        if not self.window.due(step):
            return
        for layer in self.layers:
            threshold = self.strength * self.window.every * self._learning_rate(layer)
            shrink = self._shrink_filters if self.groups == "filters" else self._shrink_units
            layer.weight.mul_(shrink(layer, threshold))

    def settle(self) -> None:
        for layer in self.layers:
            layer.keep_largest()

    def _shrink_units(self, layer: SparseLayer, threshold: float) -> Tensor:
        units = layer.units
        norms = units.sums(layer.weight.detach().float().square()).sqrt()
        factors = _proximal(norms, units.sizes, threshold)
        if self.groups == "dropped":
            factors = factors.masked_fill(units.keep(layer.magnitude()), 1)
        return units.spread(factors).to(layer.weight.dtype)

    def _shrink_filters(self, layer: SparseLayer, threshold: float) -> Tensor:
        rows = layer.weight.detach().float().flatten(1)
        norms = rows.norm(dim=1)
        factors = _proximal(norms, norms.new_tensor(rows.shape[1]), threshold)
        return factors.view(-1, *[1] * (layer.weight.dim() - 1)).to(layer.weight.dtype)

    def _learning_rate(self, layer: SparseLayer) -> float:
        for group in self.optimizer.param_groups:
            if any(parameter is layer.weight for parameter in group["params"]):
                return float(group["lr"])
        raise AssertionError("train_sparse has checked that the optimizer holds the weight")


def _proximal(norms: Tensor, sizes: Tensor, threshold: float) -> Tensor:
    """The factor on each group; a norm of zero gives zero."""
    return (1.0 - threshold * sizes.sqrt() / norms.clamp_min(1e-30)).clamp_min(0.0)
