"""What every reconstruction makes of the second moment of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.prune.scores import Columns


@dataclass(frozen=True)
class ReconstructionOptions:
    """Settings of a reconstruction.

    Attributes:
        solver_block: columns whose updates to the columns on their right are applied together;
            changes the speed, and for block patterns how late a block is chosen.
        dampening: fraction of the mean diagonal that is added to the diagonal of the second
            moment before it is inverted.
    """

    solver_block: int = 128
    dampening: float = 0.01

    def __post_init__(self) -> None:
        if self.solver_block < 1:
            raise ValueError(f"prune: solver_block must be at least 1, got {self.solver_block}")
        if not self.dampening > 0:
            raise ValueError(f"prune: dampening must be greater than 0, got {self.dampening}")


def damped(moment: Tensor, options: ReconstructionOptions) -> Tensor:
    """The moment with a diagonal that makes it positive definite."""
    mean = moment.diagonal().mean()
    out = moment.clone()
    # All inputs zero: any positive diagonal serves, nothing can be lost.
    out.diagonal().add_(options.dampening * (mean if mean > 0 else 1.0))
    return out


def known_columns(moment: Tensor, options: ReconstructionOptions) -> Columns:
    """What the moment says about each column, for a score."""

    def inverse_diagonal() -> Tensor:
        factor = torch.linalg.cholesky(damped(moment, options))
        return torch.cholesky_inverse(factor).diagonal()

    return Columns(moment.diagonal().sqrt(), inverse_diagonal)
