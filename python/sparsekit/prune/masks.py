"""Masks that hold while the model is trained further, and their files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparsekit.files import replacing

_FORMAT = "sparsekit masks"


class HeldMasks:
    """Keeps pruned weights at exactly zero until `remove`. Also a context manager.

    Attributes:
        masks: what is held, for `save_masks`.
    """

    def __init__(
        self, masks: Mapping[str, Tensor], handles: list[Any], enforce: Callable[[], None]
    ) -> None:
        self.masks = masks
        self._handles = handles
        self._enforce = enforce

    def enforce(self) -> None:
        """Zero the pruned weights now; needed only after writing to the weights by hand."""
        self._enforce()

    def remove(self) -> None:
        """Take the hooks off. The weights stay as they are and may change freely from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HeldMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold_masks(
    model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> HeldMasks:
    """Keep pruned weights at exactly zero while fine-tuning, whatever the optimizer does.

    The pruned weights are zeroed at once. From then on their gradients are zeroed, so that no
    momentum builds up, and they are zeroed again after every optimizer step, so that momentum
    from before cannot move them either. To resume an interrupted training, load the model's and
    the optimizer's state, and hold the masks that `save_masks` wrote.

    Args:
        model: trained as usual.
        masks: module name -> bool of the weight's shape, True = kept; `PruneReport.masks`.
        optimizer: the only one to watch; None watches every `torch.optim` optimizer.

    Returns:
        A handle; `.remove()` or leaving its `with` block ends it.

    Raises:
        ValueError: a mask names no module with a weight of its shape.
    """
    held = [(weight_of(model, name, mask), mask) for name, mask in masks.items()]
    pruned = [(weight, ~mask.to(weight.device)) for weight, mask in held]

    @torch.no_grad()
    def enforce(*_: object) -> None:
        for weight, drop in pruned:
            weight.masked_fill_(drop.to(weight.device), 0)

    enforce()
    handles: list[Any] = []
    for weight, drop in pruned:
        if weight.requires_grad:
            # masked_fill, not a product: 0 · NaN would be NaN.
            handles.append(weight.register_hook(lambda grad, drop=drop: grad.masked_fill(drop, 0)))
    if optimizer is None:
        handles.append(register_optimizer_step_post_hook(enforce))
    else:
        handles.append(unwrapped(optimizer).register_step_post_hook(enforce))
    return HeldMasks(masks, handles, enforce)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps, inside of wrappers such as Accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def weight_of(model: nn.Module, name: str, mask: Tensor) -> nn.Parameter:
    """The weight a mask belongs to.

    Raises:
        ValueError: no such module, no weight, or another shape.
    """
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        raise ValueError(
            f"masks: the model has no layer {name!r} with a weight; pass the masks of the report "
            "that pruned this model"
        ) from None
    if not isinstance(weight, nn.Parameter) or weight.shape != mask.shape:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"masks: the mask of {name!r} has shape {list(mask.shape)}, its weight has {shape}; "
            "pass the masks of the report that pruned this model"
        )
    return weight


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks to a safetensors file, which `load_masks` reads back.

    Args:
        masks: module name -> bool, True = kept; `PruneReport.masks` or `HeldMasks.masks`.
        path: replaced whole or, when the writing fails, left as it was.
    """
    path = Path(path)
    # Tensors that share memory or are laid out otherwise cannot be written as they are.
    copies = {
        name: mask.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, mask in masks.items()
    }
    with replacing(path) as folder:
        save_file(copies, folder / path.name, {"format": _FORMAT})


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks that `save_masks` wrote.

    Raises:
        ValueError: the file is damaged, or holds something else.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found == _FORMAT:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: the file is damaged or no safetensors file: {error}") from None
    raise ValueError(f"{path}: expected {_FORMAT}, the file holds {found!r}")
