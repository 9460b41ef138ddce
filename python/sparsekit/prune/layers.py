"""The layers that can be pruned, seen as the matrices that a pattern is defined on.

Row i of a convolution's matrix is filter i, tap after tap: column `tap · t + c` is input channel c
of tap t, so sparsity runs along the input channels within each tap. The taps of one filter are
padded to whole tiles of the pattern, so that no tile lies in two taps. A linear layer is the case
of one tap, which needs no padding. Grouped convolutions have one matrix for each group: its
filters read channels of their own and so have statistics of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.patterns import Pattern

Prunable: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass
class Layer:
    """A weight to prune and every module that computes with it (more than one when tied)."""

    name: str
    modules: list[Prunable]

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight

    @property
    def groups(self) -> int:
        return groups_of(self.modules[0])

    def matrices(self, weight: Tensor, pattern: Pattern) -> Tensor:
        """`weight`, of this layer's shape, as `[groups, n / groups, k]` with padded taps."""
        n, channels = weight.shape[:2]
        taps = weight.reshape(n, channels, -1).transpose(1, 2)
        padded = F.pad(taps, (0, self._padding(pattern)))
        return padded.reshape(self.groups, n // self.groups, -1)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`: padding is dropped."""
        shape = self.weight.shape
        taps = matrices.reshape(shape[0], shape[2:].numel(), -1)[:, :, : shape[1]]
        return taps.transpose(1, 2).reshape(shape).contiguous()

    def pad_moments(self, moments: Tensor, pattern: Pattern) -> Tensor:
        """Second moments `[groups, k, k]` of the inputs, with zeros for padded columns."""
        missing = self._padding(pattern)
        if missing == 0:
            return moments
        channels = self.weight.shape[1]
        by_tap = moments.unflatten(1, (-1, channels)).unflatten(3, (-1, channels))
        padded = F.pad(by_tap, (0, missing, 0, 0, 0, missing))
        return padded.flatten(3).flatten(1, 2)

    def _padding(self, pattern: Pattern) -> int:
        """Columns that fill up each tap."""
        shape = self.weight.shape
        return -shape[1] % pattern.k_tile if shape[2:].numel() > 1 else 0


def groups_of(module: Prunable) -> int:
    """Parts of the input channels that are computed apart: 1 unless a convolution has more."""
    return 1 if isinstance(module, nn.Linear) else module.groups
