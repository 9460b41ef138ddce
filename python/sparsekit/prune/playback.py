"""Finished blocks answer from kept outputs, so that a deep model is not computed again for each
group of layers.

A block that answers from its own outputs never looks at its input. In a stack of such blocks the
outputs of all but the last are therefore only carried along: they become `Hollow` tensors, without
numbers, and a stack of any depth keeps the outputs of one block. An operation that does read a
hollow tensor, a long skip connection for instance, raises `HollowRead`; whoever runs the model then
computes the block again and keeps its outputs from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.prune.hollow import Hollow


class HollowRead(Exception):
    """The numbers of a hollow output were asked for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__("the outputs of a finished block are read by somebody else")
        self.block = block


class Recording:
    """Collects the outputs of a block, one for each batch.

    Args:
        block: whose outputs they are.
        hollow: without their numbers.
        limit: most bytes; more than these and none is kept.
    """

    def __init__(self, block: nn.Module, hollow: bool, limit: int) -> None:
        self.block = block
        self.hollow = hollow
        self.nbytes = 0
        self._limit = limit
        self._failed = False
        self._outputs: dict[int, Any] = {}

    def add(self, batch: int, output: Any) -> None:
        # A block that runs twice in one forward cannot tell the calls apart in playback.
        self._failed |= batch in self._outputs
        if not self.hollow:
            self.nbytes += _nbytes(output)
            self._failed |= self.nbytes > self._limit
        if self._failed:
            self._outputs.clear()
        else:
            # What follows may write into the output, a residual sum for instance.
            self._outputs[batch] = _hollow(self.block, output) if self.hollow else _clone(output)

    def outputs(self, batches: int) -> list[Any] | None:
        """One for each batch; None where that cannot be."""
        if self._failed or len(self._outputs) != batches:
            return None
        return [self._outputs[batch] for batch in range(batches)]


class Playback:
    """Lets a block return kept outputs instead of computing, until `stop`.

    Args:
        block: its `forward` is replaced.
        outputs: one for each batch.
        current: which batch the model runs on.
    """

    def __init__(
        self, block: nn.Module, outputs: Sequence[Any], current: Callable[[], int]
    ) -> None:
        self._block = block
        self._outputs = outputs
        self._before = block.__dict__.get("forward")
        # An instance attribute shadows the class's forward; deleting it brings that back.
        block.__dict__["forward"] = lambda *args, **kwargs: _clone(self._outputs[current()])

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self._outputs))

    @property
    def is_hollow(self) -> bool:
        return any(isinstance(leaf, Hollow) for leaf in tree_leaves(self._outputs))

    def empty(self) -> None:
        """Forget the numbers."""
        self._outputs = [_hollow(self._block, output) for output in self._outputs]

    def stop(self) -> None:
        if self._before is None:
            del self._block.__dict__["forward"]
        else:
            self._block.__dict__["forward"] = self._before


def _clone(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t if isinstance(t, Hollow) else t.clone(), value)


def _hollow(block: nn.Module, value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: Hollow(t, t.device, lambda: HollowRead(block)), value)


def _nbytes(value: Any) -> int:
    return sum(
        leaf.nbytes
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and not isinstance(leaf, Hollow)
    )
