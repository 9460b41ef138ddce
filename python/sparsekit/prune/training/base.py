"""What every method of sparse training is made of: layers with masks, and a window of steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sparsekit.patterns import Pattern
from sparsekit.prune.layers import Layer, Prunable
from sparsekit.prune.layerwise import describe
from sparsekit.prune.report import PruneReport
from sparsekit.prune.training.units import Units


class SparseLayer:
    """A layer that becomes sparse while it is trained.

    Attributes:
        layer: the weight, seen as matrices.
        pattern: what its mask follows in the end; None when a method leaves the layer dense.
        units: the weight in units of the pattern it started with.
        mask: bool of the weight's shape, True = kept: what is held at zero from step to step.
        dense_gradient: whether the next gradient is let through where the mask is False.
    """

    def __init__(self, layer: Layer, pattern: Pattern) -> None:
        self.layer = layer
        self.pattern: Pattern | None = pattern
        self.units = Units(layer, pattern)
        self.mask = torch.ones_like(layer.weight, dtype=torch.bool)
        self.dense_gradient = False

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def weight(self) -> nn.Parameter:
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def finite_weight(self) -> Tensor:
        """The weight, detached.

        Raises:
            ValueError: it holds NaN or infinities: the training went wrong.
        """
        return _finite(self.weight.detach(), self.name, "weight")

    def magnitude(self) -> Tensor:
        """Σ|w| of each unit, of a weight that is finite."""
        return self.units.sums(self.finite_weight().abs())

    def gradient(self) -> Tensor:
        """Σ|∂loss/∂w| of each unit.

        Raises:
            ValueError: there is no gradient, or it holds NaN or infinities.
        """
        if self.weight.grad is None:
            raise ValueError(
                f"train_sparse: layer {self.name!r} has no gradient to choose new weights by; "
                "call loss.backward() before optimizer.step(), or leave the layer out with ignore="
            )
        return self.units.sums(_finite(self.weight.grad, self.name, "gradient").abs())

    def keep(self, units: Tensor) -> None:
        """Set the mask by units, bool `[pools, units]`."""
        self.mask = self.units.spread(units)

    def keep_largest(self) -> None:
        """Set the mask to the pattern's magnitude mask."""
        if self.pattern is None:
            self.mask = torch.ones_like(self.mask)
            return
        scores = self.layer.matrices(self.finite_weight().abs(), self.pattern)
        masks = torch.stack([self.pattern.mask(score) for score in scores])
        self.mask = self.layer.from_matrices(masks)

    def hold(self) -> None:
        """Zero what the mask drops."""
        self.weight.masked_fill_(~self.mask, 0)


def sparse_layers(chosen: Mapping[str, tuple[Layer, Pattern]]) -> list[SparseLayer]:
    """The chosen layers, with all-True masks.

    Raises:
        ValueError: a weight is empty, or holds NaN or infinities.
    """
    for name, (layer, _) in chosen.items():
        if layer.weight.numel() == 0:
            raise ValueError(
                f"prune: the weight of {name!r} is empty {list(layer.weight.shape)}; "
                "leave it out with ignore="
            )
        _finite(layer.weight.detach(), name, "weight")
    return [SparseLayer(layer, pattern) for layer, pattern in chosen.values()]


def training_report(
    method: str,
    layers: Sequence[SparseLayer],
    dense: Mapping[str, tuple[Prunable, str]],
    began: float,
) -> PruneReport:
    """What became of the layers, and why others stayed dense; `began` by `time.perf_counter()`."""
    done = [
        describe(
            layer.name,
            layer.weight,
            layer.pattern,
            reason="" if layer.pattern else "the allocation keeps all of it",
        )
        for layer in layers
    ]
    done += [
        describe(name, module.weight, None, reason=why) for name, (module, why) in dense.items()
    ]
    masks = {layer.name: layer.mask for layer in layers if layer.pattern is not None}
    return PruneReport(method, "none", tuple(done), masks, time.perf_counter() - began)


def _finite(values: Tensor, name: str, what: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"prune: the {what} of {name!r} holds NaN or infinities; if it was finite before the "
            "training, that has diverged: lower the learning rate or clip gradients"
        )
    return values


@dataclass(frozen=True)
class Window:
    """The steps, counted from 1, in which a method works: above `first`, up to `last`.

    After `last` the masks are final, and the rest of the training lets the kept weights recover.

    Attributes:
        every: steps from one update of the masks to the next.
    """

    first: int
    last: int
    every: int

    @classmethod
    def of(cls, steps: int, every: int, start: float, end: float) -> Window:
        """The window from a share `start` to a share `end` of the steps.

        Raises:
            ValueError: `every` is below 1, or not 0 ≤ start < end ≤ 1.
        """
        if every < 1:
            raise ValueError(f"train_sparse: every must be at least 1 step, got {every}")
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(
                "train_sparse: start and end are shares of the steps, 0 <= start < end <= 1, got "
                f"start={start}, end={end}"
            )
        return cls(round(start * steps), max(1, round(end * steps)), every)

    def due(self, step: int) -> bool:
        """Whether the masks are updated at this step."""
        return self.first < step <= self.last and (step - self.first) % self.every == 0

    def progress(self, step: int) -> float:
        """How much of the window has passed, 0 to 1."""
        if step >= self.last:
            return 1.0
        return max(0.0, (step - self.first) / (self.last - self.first))


class TrainingMethod(ABC):
    """One way to train sparse: what happens around each optimizer step of its window.

    Called in this order: `begin` once; then for each step up to `window.last`, counted from 1,
    `before_step` (gradients are there) and `after_step` (the weights have moved); `settle` once.
    After each call but `before_step` the weights are what a forward pass shall see.
    All of it runs without autograd.

    Args:
        layers: with all-True masks.
        optimizer: holds their weights.
        window: the steps in which the method works.
    """

    def __init__(self, layers: Sequence[SparseLayer], optimizer: Optimizer, window: Window) -> None:
        self.layers = layers
        self.optimizer = optimizer
        self.window = window

    def begin(self) -> None:  # noqa: B027
        """Prepare masks and weights for the first forward pass."""

    def dense_gradients(self, step: int) -> bool:
        """Whether the gradients of this step are needed where masks are False."""
        return False

    def before_step(self, step: int) -> None:  # noqa: B027
        """Read or change the gradients."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Change masks and weights."""

    @abstractmethod
    def settle(self) -> None:
        """Give each layer its final mask; what it drops is zeroed afterwards."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs besides weights and masks; loading copies into them."""
        return {}

    def resettle(self) -> None:  # noqa: B027
        """Restore, from the loaded state, what `settle` decided besides the masks."""


def same_random(seed: int, step: int, index: int) -> torch.Generator:
    """Random numbers that depend on seed, step and layer alone: a resumed run draws the same ones.

    On the CPU, so that they are the same on every device.
    """
    # Scattered: with the seed that initialised the weights, a mask would follow their values.
    mixed = ((seed + 1) * 1_000_003 + step) * 1_000_003 + index
    return torch.Generator().manual_seed(mixed * 0x9E3779B97F4A7C15 % (1 << 63))


def gradient_scale(optimizer: Optimizer) -> float:
    """What the gradients are multiplied by: a fused optimizer undoes a `GradScaler` itself."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
