"""Tensors that have a shape but no numbers, and say so when somebody wants to compute with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Hollow(Tensor):
    """A tensor that can be carried along and asked for its shape, dtype and device.

    The meta device does not serve: its tensors spread by computing, and a matrix product with one
    on a CPU reads memory that is nobody's.

    Args:
        like: has the shape and dtype.
        device: which it claims to be on.
        error: makes what any operation raises.
    """

    error: Callable[[], Exception]

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, error: Callable[[], Exception]) -> Hollow:
        made: Hollow = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made.error = error
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        hollow = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Hollow))
        raise next(hollow).error()
