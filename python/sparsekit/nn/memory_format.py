"""NHWC (torch's channels_last) for whole models: sparse convolutions compute in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def is_channels_last(x: Tensor, dims: int) -> bool:
    """Whether the channels of each pixel lie side by side.

    Args:
        x: of a convolution.
        dims: of the convolution, 1 or 2.
    """
    channels = x.dim() - 1 - dims
    return x.shape[channels] <= 1 or x.stride(channels) == 1


def put_channels_last(x: Tensor, dims: int) -> Tensor:
    """The same values with the channels of each pixel side by side."""
    channels = x.dim() - 1 - dims
    return x.movedim(channels, -1).contiguous().movedim(-1, channels)


def put_weights_in_nhwc(model: nn.Module) -> list[nn.Parameter]:
    """Set the weights of dense 2-D convolutions to channels_last: torch's outputs follow them.

    Returns:
        The weights that changed; they were contiguous.
    """
    holders: dict[int, set[int]] = {}
    for parameter in filter(_is_plain, model.parameters()):
        address = parameter.untyped_storage().data_ptr()
        holders.setdefault(address, set()).add(id(parameter))
    changed = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or not _is_plain(weight):
            continue
        assert weight is not None
        # A view of a memory that others hold would lose its tie.
        alone = len(holders[weight.untyped_storage().data_ptr()]) == 1
        if alone and weight.is_contiguous():
            last = weight.data.to(memory_format=torch.channels_last)
            if last.stride() != weight.stride():
                weight.data = last
                changed.append(weight)
    return changed


def _is_plain(parameter: nn.Parameter | None) -> bool:
    return (
        parameter is not None
        and not is_lazy(parameter)
        and type(parameter.data) is Tensor
        and parameter.layout == torch.strided
        and parameter.device.type != "meta"
    )


@contextmanager
def weights_in_nhwc(model: nn.Module) -> Iterator[None]:
    """`put_weights_in_nhwc` for a while."""
    changed = put_weights_in_nhwc(model)
    try:
        yield
    finally:
        for weight in changed:
            # Not contiguous(): for kernels of 1x1 both formats count as that.
            old = torch.empty_like(weight.data, memory_format=torch.contiguous_format)
            weight.data = old.copy_(weight.data)
