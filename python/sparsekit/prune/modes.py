"""The state of a model while something looks at it: modes and gradients, and both come back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own training flag comes back."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def only_trainable(model: nn.Module, weights: Collection[Tensor]) -> Iterator[None]:
    """Eval mode, gradients for `weights` alone; everything comes back as it was."""
    chosen = set(weights)
    before = [(tensor, tensor.requires_grad, tensor.grad) for tensor in model.parameters()]
    with eval_mode(model):
        try:
            for tensor, _, _ in before:
                tensor.grad = None
                tensor.requires_grad_(tensor in chosen)
            with torch.enable_grad():
                yield
        finally:
            for tensor, trainable, gradient in before:
                tensor.requires_grad_(trainable)
                tensor.grad = gradient
