"""Sparse-refined straight-through estimator: learns N:M masks from scratch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import Optimizer

from sparsekit.prune.training.base import SparseLayer, TrainingMethod, Window, gradient_scale


class SRSTE(TrainingMethod):
    """Zhou et al. 2021, arXiv 2102.04010: dense weights behind sparse ones.

    The forward pass sees the weights under the pattern's magnitude mask; the gradient it causes
    goes to the dense weights as if there were no mask (straight-through), plus `decay` times the
    dropped weights, which calms masks that flip back and forth. For N:M in the paper; any pattern
    here.

    Between optimizer steps the model's own weights are the masked ones, and the dense ones are kept
    aside: they change places just before the optimizer's step and back after it. So nothing is
    hooked into or added to the modules, and evaluating, copying, saving or exporting the model at
    any time sees a plain model with exact zeros. The dense weights are part of `run.state_dict()`.

    Trains from scratch or further. Costs a second copy of the weights and a mask per update.

    Args:
        decay: λ_W of the paper, which takes 2e-4 for SGD and less for Adam.
        every: steps between masks.
        start: share of the steps before the first mask: dense training.
        end: share of the steps after which the mask stays and the dense weights are done with.
    """

    def __init__(
        self,
        layers: Sequence[SparseLayer],
        optimizer: Optimizer,
        steps: int,
        *,
        decay: float = 2e-4,
        every: int = 1,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(layers, optimizer, Window.of(steps, every, start, end))
        if not decay >= 0.0:
            raise ValueError(f"train_sparse: decay must be at least 0, got {decay}")
        self.decay = decay
        self.dense = {layer.name: layer.weight.detach().clone() for layer in layers}

    def begin(self) -> None:
        if self.window.first == 0:
            for layer in self.layers:
                layer.keep_largest()
                layer.hold()

    def dense_gradients(self, step: int) -> bool:
        return step <= self.window.last

    def before_step(self, step: int) -> None:
        decay = self.decay * gradient_scale(self.optimizer)
        for layer in self.layers:
            dense = self.dense[layer.name]
            layer.weight.copy_(dense)
            if layer.weight.grad is not None:
                layer.weight.grad.add_(dense.masked_fill(layer.mask, 0), alpha=decay)

    def after_step(self, step: int) -> None:
        for layer in self.layers:
            self.dense[layer.name].copy_(layer.weight)
            if self.window.due(step):
                layer.keep_largest()
            layer.hold()

    def settle(self) -> None:
        for layer in self.layers:
            layer.weight.copy_(self.dense[layer.name])
            layer.keep_largest()

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/dense": dense for name, dense in self.dense.items()}
