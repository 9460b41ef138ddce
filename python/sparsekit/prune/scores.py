"""Scores: how much each weight matters. Higher = keep; `Pattern.mask` turns a score into a mask.

A score says nothing about the pattern, and nothing about what happens to the kept weights: that
is the reconstruction's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

from torch import Tensor


class Columns:
    """What calibration knows about the input columns of a weight, or of a slice of its columns.

    Args:
        norms: `[k]`, root mean square of each input feature over the calibration tokens, or over
            the patches under a convolution's filters (0 for padded columns).
        inverse_diagonal: makes the attribute of that name when a score first reads it: inverting
            costs k³ operations that most scores do without.

    Attributes:
        inverse_diagonal: `[k]`, diagonal of the inverse of the damped second moment of the inputs;
            within a sweep, of the columns that are still free.
    """

    def __init__(self, norms: Tensor, inverse_diagonal: Callable[[], Tensor]) -> None:
        self.norms = norms
        self._invert = inverse_diagonal

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        return self._invert()

    def slice(self, start: int, stop: int) -> Columns:
        """The columns from `start` to before `stop`."""
        return Columns(self.norms[start:stop], lambda: self.inverse_diagonal[start:stop])


Score: TypeAlias = Callable[[Tensor, Columns | None], Tensor]
"""`(weight [n, k], columns or None without calibration) -> score [n, k]`, float32 or wider."""


def magnitude(weight: Tensor, columns: Columns | None) -> Tensor:
    """`|W|`: needs no data."""
    return weight.abs()


def wanda(weight: Tensor, columns: Columns | None) -> Tensor:
    """`(|W| · ‖x‖)²`, Wanda (Sun et al. 2023, arXiv 2306.11695).

    The square leaves the order as it is, and makes the sum over a vector or a block the output
    error that zeroing it would cause if the inputs were uncorrelated.
    """
    assert columns is not None
    return (weight * columns.norms).square()


def optimal_brain_surgeon(weight: Tensor, columns: Columns | None) -> Tensor:
    """w² / [H⁻¹]ⱼⱼ: the output error left after the other weights made up for the loss.

    Hassibi & Stork 1993; the score of SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774).
    """
    assert columns is not None
    return weight.square() / columns.inverse_diagonal
