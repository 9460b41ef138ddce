"""Batch normalisations see other activations after pruning than the ones they were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekit.prune.calibration import Loss, read_batches
from sparsekit.prune.modes import eval_mode


@torch.no_grad()
def update_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None
) -> list[str]:
    """Measure the statistics of every batch normalisation again, in place. Needs data, no training.

    Zeros make a convolution's outputs smaller, and its normalisation keeps dividing by the old
    deviation: a network that lost most of its accuracy to that has it back for the price of one
    forward pass (Li et al. 2020, "EagleEye", arXiv 2007.02491). The new statistics are the mean
    over the batches, each layer seeing what the layers before it make of their batch statistics,
    as in training; batches of 64 and more give good ones.

    Args:
        model: its other modules run in eval mode; all flags come back.
        batches: as for `prune`.
        loss: runs the model, as for `prune`.

    Returns:
        Names of the normalisations that have new statistics: those with running statistics that
        the batches reach.

    Raises:
        ValueError: no batches, or activations that hold NaN or infinities: nothing is changed then.
    """
    data = read_batches(batches, "update_batchnorm", loss)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not norms:
        return []
    before = {
        name: (norm.momentum, {key: value.clone() for key, value in norm.named_buffers()})
        for name, norm in norms.items()
    }
    done = False
    with eval_mode(model):
        try:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over the batches
                norm.train()
            for batch in data:
                batch(model)
            seen = [name for name, norm in norms.items() if _count(norm)]
            for name in seen:
                if not all(bool(value.isfinite().all()) for value in norms[name].buffers()):
                    raise ValueError(
                        f"update_batchnorm: the inputs of {name!r} hold NaN or infinity; check "
                        "the batches"
                    )
            done = True
        finally:
            for name, norm in norms.items():
                norm.eval()
                norm.momentum, buffers = before[name]
                if not (done and _count(norm)):
                    for key, value in norm.named_buffers():
                        value.copy_(buffers[key])
    return seen


def _count(norm: _BatchNorm) -> int:
    return int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0
