"""Lottery tickets: sparse networks that train as well as dense ones, found by pruning in rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparsekit.patterns import PatternChoice
from sparsekit.prune.masks import hold_masks
from sparsekit.prune.report import PruneReport
from sparsekit.prune.targets import choose_layers
from sparsekit.prune.training.base import SparseLayer, sparse_layers, training_report

TICKET_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda trained, initial: trained.abs(),
    "magnitude_increase": lambda trained, initial: trained.abs() - initial.abs(),
    "movement": lambda trained, initial: (trained - initial).abs(),
}
"""What is kept, by the weights after and before training (Zhou et al. 2019, arXiv 1905.01067)."""


def find_lottery_ticket(
    model: nn.Module,
    pattern: PatternChoice,
    train: Callable[[nn.Module, Mapping[str, Tensor]], object],
    *,
    rounds: int,
    rewind: int | None = 0,
    method: str = "magnitude",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> PruneReport:
    """Iterative magnitude pruning with rewinding (Frankle & Carbin 2019, arXiv 1803.03635).

    Each round trains the model, prunes it, and sets the weights that are left back to where they
    were early in the first training. The model ends as the ticket: pruned, and not trained since
    it was rewound. Train it once more to use it. Costs `rounds` trainings.

    The fraction that is kept falls by the same factor every round, to the pattern's in the last.
    Between dense and N:M, the weights of lowest score go first among those that the N:M mask drops;
    for blocks, the lowest of all.

    Args:
        model: at its first weights; changed in place.
        pattern: one pattern for all layers, or a mapping as for `prune`.
        train: `(model, masks) -> anything`, trains the model for its whole length with an optimizer
            and learning rate schedule of its own. The masks hold meanwhile, whatever it does; they
            are passed for information.
        rounds: how often it is trained and pruned.
        rewind: optimizer steps of the first training after which the weights are remembered: 0 for
            those the model came with, more for large models, which find no ticket at 0 (Frankle et
            al. 2020, arXiv 1912.05671); None keeps the trained weights, so that only the learning
            rate is rewound, by `train` (Renda et al. 2020, arXiv 2003.02389).
        method: a name in `TICKET_SCORES`.
        targets: globs or `re:` expressions of the layers to prune, as for `prune`.
        ignore: layers to leave dense, wins over `targets`.

    Returns:
        What became of each layer, with the masks.

    Raises:
        ValueError: rounds below 1, rewind below 0, an unknown method, no layer to prune, a weight
            that is empty or holds NaN or infinities; or, after the first training, that it made no
            `rewind` steps of an optimizer that trains this model.
    """
    started = time.perf_counter()
    if rounds < 1:
        raise ValueError(f"find_lottery_ticket: rounds must be at least 1, got {rounds}")
    if rewind is not None and rewind < 0:
        raise ValueError(f"find_lottery_ticket: rewind must be at least 0 or None, got {rewind}")
    if method not in TICKET_SCORES:
        known = ", ".join(sorted(TICKET_SCORES))
        raise ValueError(f"find_lottery_ticket: unknown method {method!r}; known are {known}")
    score = TICKET_SCORES[method]
    chosen, dense = choose_layers(model, pattern, targets, ignore)
    layers = sparse_layers(chosen)
    initial = [layer.weight.detach().clone() for layer in layers]
    remembered = None if rewind is None else _Remembered(model, rewind)
    for done in range(1, rounds + 1):
        masks = {layer.name: layer.mask for layer in layers}
        with hold_masks(model, masks):
            if remembered is not None and done == 1:
                with remembered:
                    train(model, masks)
            else:
                train(model, masks)
        for layer, first in zip(layers, initial, strict=True):
            _prune(layer, score(layer.finite_weight(), first), done / rounds)
        if remembered is not None:
            remembered.restore()
        with torch.no_grad():
            for layer in layers:
                layer.hold()
    return training_report(f"lottery ({method})", layers, dense, started)


@torch.no_grad()
def _prune(layer: SparseLayer, score: Tensor, progress: float) -> None:
    """Keep density^progress of the weight: of what the pattern drops in the end, that share."""
    density = layer.units.density
    share = 1.0 if density == 0 else (1.0 - density**progress) / (1.0 - density)
    scores = layer.units.sums(score)
    below_all = scores.min() - 1
    scores = torch.where(layer.units.any(layer.mask), scores, below_all)
    layer.keep(layer.units.keep_partly(scores, min(1.0, share)))


class _Remembered:
    """Parameters and buffers as they were after so many optimizer steps of the first training."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._model = model
        self._steps = steps
        self._seen = 0
        self._values: dict[str, Tensor] | None = None
        if steps == 0:
            self._remember()

    def __enter__(self) -> None:
        self._handle = register_optimizer_step_post_hook(self._count)

    def __exit__(self, error: object, *_: object) -> None:
        self._handle.remove()
        if error is None and self._values is None:
            raise ValueError(
                f"find_lottery_ticket: rewind={self._steps}, but the training made {self._seen} "
                "steps of a torch.optim optimizer that holds this model's parameters; rewind to an "
                "earlier step"
            )

    @torch.no_grad()
    def restore(self) -> None:
        assert self._values is not None
        for name, tensor in self._tensors().items():
            tensor.copy_(self._values[name])

    def _count(self, optimizer: Optimizer, *_: object) -> None:
        mine = {id(parameter) for parameter in self._model.parameters()}
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            self._seen += 1
            if self._seen == self._steps:
                self._remember()

    def _remember(self) -> None:
        self._values = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters()) | dict(self._model.named_buffers())
