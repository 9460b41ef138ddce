"""Differentiable sparsity allocation: how dense each layer shall be, learned by gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sparsekit.patterns import at_density
from sparsekit.prune.training.base import SparseLayer, TrainingMethod, Window, gradient_scale
from sparsekit.prune.training.units import ranks

_FINAL_TEMPERATURE = 0.1
_MOMENTUM = 0.9


class DSA(TrainingMethod):
    """Ning et al. 2020, arXiv 2004.02164: learn each layer's keep ratio under one budget.

    While it learns, each unit counts by a soft mask p = σ((α - r) / T), where α is its layer's keep
    ratio, r the relative rank of its magnitude in its pool, and T a temperature that falls to a
    tenth. The loss then has a gradient by α. The keep ratios follow it, per weight kept, and are
    projected back to where all layers together keep as much as the given patterns do. At `end`
    every layer gets the pattern of its kind at the density found: that share of blocks, or n of m
    positions, rounded so that the budget holds. The steps that are left train under these masks.
    The paper's soft mask is a sigmoid of log magnitude around a threshold solved for α; of ranks
    the threshold is α itself, and groups of N:M are served as well as blocks.

    As with SR-STE, the weights between optimizer steps are the ones a forward pass shall see, soft
    mask included, and the full ones are kept aside; the gradients of both α and weights follow from
    those by the chain rule, so nothing is added to the modules.

    Needs a trained model and costs a second copy of the weights, a soft mask, and one ranking per
    update. `run.allocation` is the mapping found, for any other method to be given as its pattern.

    Args:
        rate: most that a keep ratio moves in one update; it falls to zero towards `end`.
        temperature: T at the start.
        every: steps between updates of keep ratios and ranks.
        start: share of the steps before the keep ratios first move.
        end: share of the steps after which the patterns are fixed and the weights pruned.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        optimizer: Optimizer,
        steps: int,
        *,
        rate: float = 0.02,
        temperature: float = 0.2,
        every: int = 1,
        start: float = 0.0,
        end: float = 0.5,
    ) -> None:
        super().__init__(layers, optimizer, Window.of(steps, every, start, end))
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"train_sparse: rate must be above 0 and at most 1, got {rate}")
        if not temperature > 0.0:
            raise ValueError(f"train_sparse: temperature must be above 0, got {temperature}")
        self.rate = rate
        self.temperature = temperature
        sizes = [layer.weight.numel() for layer in layers]
        self.costs = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        self.levels = torch.tensor([layer.units.real.shape[1] for layer in layers])
        self.ratios = torch.tensor([layer.units.kept for layer in layers]) / self.levels.double()
        self.lowest = torch.minimum(1.0 / self.levels, self.ratios)
        self.budget = float(self.costs @ self.ratios)
        self.slopes = torch.zeros_like(self.ratios)
        self.full = {layer.name: layer.weight.detach().clone() for layer in layers}
        self.soft = {
            layer.name: torch.ones(layer.units.real.shape, device=layer.weight.device)
            for layer in layers
        }

    def begin(self) -> None:
        self._soften(0)
        self._show()

    def dense_gradients(self, step: int) -> bool:
        return step <= self.window.last

    def before_step(self, step: int) -> None:
        slopes = torch.zeros_like(self.slopes)
        for index, layer in enumerate(self.layers):
            full, soft = self.full[layer.name], self.soft[layer.name]
            gradient = layer.weight.grad
            layer.weight.copy_(full)
            if gradient is None:
                continue
            if self.window.due(step):
                # ∂p/∂α = p (1 - p) / T, and what is the same for all layers drops out.
                by_mask = layer.units.sums(gradient.float() * full.float())
                slope = (by_mask * soft * (1.0 - soft)).sum() / layer.weight.numel()
                slopes[index] = float(slope)
            gradient.mul_(layer.units.spread(soft).to(gradient.dtype))
        if self.window.due(step):
            self._move_ratios(slopes, step)

    def after_step(self, step: int) -> None:
        for layer in self.layers:
            self.full[layer.name].copy_(layer.weight)
        if self.window.due(step):
            self._soften(step)
        self._show()

    def settle(self) -> None:
        self.resettle()
        for layer in self.layers:
            layer.weight.copy_(self.full[layer.name])
            layer.keep_largest()

    def resettle(self) -> None:
        for layer, count, levels in zip(
            self.layers, self._counts().tolist(), self.levels.tolist(), strict=True
        ):
            if layer.pattern is not None:
                layer.pattern = at_density(layer.pattern, count / levels)

    def state(self) -> dict[str, Tensor]:
        return (
            {"ratios": self.ratios, "slopes": self.slopes}
            | {f"{name}/full": full for name, full in self.full.items()}
            | {f"{name}/soft": soft for name, soft in self.soft.items()}
        )

    def _soften(self, step: int) -> None:
        cooled = 1.0 - (1.0 - _FINAL_TEMPERATURE) * self.window.progress(step)
        for layer, ratio in zip(self.layers, self.ratios.tolist(), strict=True):
            magnitude = layer.units.sums(self.full[layer.name].abs())
            place = (ranks(magnitude) + 0.5) / magnitude.shape[1]
            soft = torch.sigmoid((ratio - place) / (self.temperature * cooled))
            self.soft[layer.name].copy_(soft)

    def _show(self) -> None:
        """Make the weights what a forward pass shall see."""
        for layer in self.layers:
            soft = layer.units.spread(self.soft[layer.name])
            layer.weight.copy_(self.full[layer.name] * soft)

    def _move_ratios(self, slopes: Tensor, step: int) -> None:
        if not bool(slopes.isfinite().all()):
            bad = self.layers[int((~slopes.isfinite()).byte().argmax())].name
            raise ValueError(
                f"train_sparse: the gradient of {bad!r} holds NaN or infinities: the training has "
                "diverged; lower the learning rate or clip gradients"
            )
        self.slopes.lerp_(slopes / gradient_scale(self.optimizer), 1.0 - _MOMENTUM)
        steepest = float(self.slopes.abs().max())
        if steepest > 0.0:
            rate = self.rate * (1.0 - self.window.progress(step))
            self.ratios.copy_(self._project(self.ratios - rate * self.slopes / steepest))

    def _project(self, ratios: Tensor) -> Tensor:
        """The nearest ratios, a weight counting the same in every layer, that meet the budget."""
        low, high = -2.0, 2.0
        for _ in range(60):
            shift = (low + high) / 2
            kept = float(self.costs @ (ratios + shift).clamp(self.lowest, torch.ones(())))
            low, high = (shift, high) if kept < self.budget else (low, shift)
        return (ratios + low).clamp(self.lowest, torch.ones(()))

    def _counts(self) -> Tensor:
        """Units that each pool keeps: the ratios rounded down, then up while budget is left."""
        wanted = self.ratios * self.levels
        counts = torch.maximum((wanted + 1e-9).floor(), (self.lowest * self.levels).round())
        costs = self.costs / self.levels
        left = self.budget - float(counts @ costs)
        for index in (wanted - counts).argsort(descending=True, stable=True).tolist():
            if counts[index] < self.levels[index] and costs[index] <= left + 1e-12:
                counts[index] += 1
                left -= float(costs[index])
        return counts
