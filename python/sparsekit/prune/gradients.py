"""Gradients of a loss with respect to the weights to prune, averaged over the batches.

One pass: each batch goes forward and backward once through the model in eval mode (dropout off,
batch norm with its running statistics), with everything but the chosen weights frozen. A weight's
gradient is added up and dropped as soon as the backward pass has made it, so that memory holds one
float32 copy of the chosen weights besides what the forward pass keeps for the backward one.

The mean is over batches: one that does not reach a layer counts as a gradient of zero. Gradients
have the dtype of their weight: small ones of float16 weights become zero unless the loss is scaled
up, which changes no ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.prune.calibration import Batch
from sparsekit.prune.modes import only_trainable
from sparsekit.prune.scores import Unpruned


def mean(model: Unpruned) -> dict[str, Tensor]:
    """Mean of the gradient: that of the mean loss."""
    return _mean_of(lambda gradient: gradient, model)


def mean_absolute(model: Unpruned) -> dict[str, Tensor]:
    """Mean of each batch's absolute gradient."""
    return _mean_of(torch.abs, model)


def mean_square(model: Unpruned) -> dict[str, Tensor]:
    """Mean of each batch's squared gradient."""
    return _mean_of(torch.square, model)


def _mean_of(what: Callable[[Tensor], Tensor], model: Unpruned) -> dict[str, Tensor]:
    weights = {name: layer.weight for name, (layer, _) in model.layers.items()}
    totals: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.to(torch.promote_types(weight.dtype, torch.float32))
        weight.grad = None
        value = what(gradient)
        totals[name] = totals[name].add_(value) if name in totals else value

    with only_trainable(model.module, weights.values()), ExitStack() as stack:
        for name, weight in weights.items():
            hook = weight.register_post_accumulate_grad_hook(
                lambda weight, name=name: add(name, weight)
            )
            stack.callback(hook.remove)
        for index, batch in enumerate(model.batches):
            loss = _loss_of(batch, model.module, index)
            if loss.requires_grad:
                # Into these weights alone: the loss may hold others, of a teacher for instance.
                loss.backward(inputs=list(weights.values()))
    for name in weights:
        if name in totals and not bool(totals[name].isfinite().all()):
            raise ValueError(
                f"gradients: the gradient of layer {name!r} holds NaN or infinity, the losses do "
                "not; check the loss, or compute in a wider dtype"
            )
    return {name: totals[name].div_(len(model.batches)) for name in weights if name in totals}


def _loss_of(batch: Batch, model: nn.Module, index: int) -> Tensor:
    output = batch(model)
    loss = output if batch.loss is not None else _own_loss(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        came = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "gradients: loss must return a tensor of one value for each batch, got "
            f"{came} for batch {index}; average over the batch"
        )
    if not bool(loss.isfinite()):
        raise ValueError(
            f"gradients: batch {index} gives the loss {loss.item()}; check the batch and its "
            "labels, or compute in a wider dtype"
        )
    return loss


def _own_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            "gradients: this method needs a loss, and the model's output "
            f"({type(output).__name__}) has none; pass loss=lambda model, batch: ..., or batches "
            "with labels to a model that then returns .loss"
        )
    assert isinstance(loss, Tensor)
    return loss
