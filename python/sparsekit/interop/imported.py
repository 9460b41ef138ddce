"""What the readers have in common: the result, and how a mask of another package is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Imported:
    """Plain weights and what was kept of them.

    Attributes:
        state: every parameter and buffer by the name that a dense model has for it; pruned values
            are zero. Of a model its `state_dict()`.
        masks: layer name -> bool of its weight's shape, True = kept, as `PruneReport.masks`. Masks
            of other parameters are applied and not listed.
    """

    state: dict[str, Tensor]
    masks: dict[str, Tensor]

    def __str__(self) -> str:
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        total = sum(mask.numel() for mask in self.masks.values())
        share = f", {1 - kept / total:.1%} of their weights zero" if total else ""
        return f"{len(self.state)} tensors, {len(self.masks)} pruned layers{share}"


def checked_mask(what: str, name: str, mask: Tensor, weight: Tensor | None) -> Tensor:
    """The mask as bool.

    Args:
        what: who asks; begins the message.
        name: of the parameter.
        mask: bool, or numbers that are 0 or 1.
        weight: the parameter; None: there is none.

    Raises:
        ValueError: it is not, there is no such parameter, or it has another shape.
    """
    if weight is None:
        raise ValueError(f"{what}: there is a mask for {name!r}, but no such parameter")
    if mask.shape != weight.shape:
        raise ValueError(
            f"{what}: the mask of {name!r} has shape {list(mask.shape)}, the parameter "
            f"{list(weight.shape)}"
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{what}: the mask of {name!r} holds values other than 0 and 1")
    return mask.to(weight.device) != 0


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with zeros where the mask is False, also where it is not finite there."""
    return weight.detach().masked_fill(~mask, 0)


def add_mask(masks: dict[str, Tensor], name: str, mask: Tensor) -> None:
    """List the mask of a parameter if it is a layer's weight and prunes anything."""
    layer, _, parameter = name.rpartition(".")
    if parameter != "weight" or bool(mask.all()):
        return
    masks[layer] = masks[layer] & mask if layer in masks else mask


def joined(*parts: str) -> str:
    """A dotted name; of the root module nothing comes before."""
    return ".".join(part for part in parts if part)
