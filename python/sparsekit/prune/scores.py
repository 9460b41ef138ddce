"""Scores: how much each weight matters. Higher = keep; `Pattern.mask` turns a score into a mask.

A score says nothing about the pattern, and nothing about what happens to the kept weights: that
is the reconstruction's choice. What it cannot see from the weights and inputs of one layer comes
from a statistic, made of the whole model before anything is pruned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sparsekit.patterns import Pattern
from sparsekit.prune.calibration import Batch
from sparsekit.prune.layers import Layer

# How far |W| may move a score that is the same for many weights, relative to it.
_TIE = 2.0**-20

# Rows whose distances to all others are in memory together.
_ROWS = 1024


class Columns:
    """What is known about the columns of a weight, or of a slice of them.

    Args:
        norms: `[k]`, root mean square of each input feature over the calibration tokens, or over
            the patches under a convolution's filters (0 for padded columns). None without
            calibration.
        inverse_diagonal: makes the attribute of that name when a score first reads it: inverting
            costs k³ operations that most scores do without.
        statistic: `[n, k]`, the method's statistic (0 for padded columns).
        start: index of the first of these columns in the whole matrix.

    Attributes:
        inverse_diagonal: `[k]`, diagonal of the inverse of the damped second moment of the inputs;
            within a sweep, of the columns that are still free.
    """

    def __init__(
        self,
        norms: Tensor | None,
        inverse_diagonal: Callable[[], Tensor] | None = None,
        statistic: Tensor | None = None,
        start: int = 0,
    ) -> None:
        self._norms = norms
        self._invert = inverse_diagonal
        self._statistic = statistic
        self.start = start

    @property
    def norms(self) -> Tensor:
        assert self._norms is not None
        return self._norms

    @property
    def statistic(self) -> Tensor:
        assert self._statistic is not None
        return self._statistic

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        assert self._invert is not None
        return self._invert()

    def slice(self, start: int, stop: int) -> Columns:
        """The columns from `start` to before `stop`."""
        return Columns(
            None if self._norms is None else self._norms[start:stop],
            lambda: self.inverse_diagonal[start:stop],
            None if self._statistic is None else self._statistic[:, start:stop],
            self.start + start,
        )


Score: TypeAlias = Callable[[Tensor, Columns | None], Tensor]
"""`(weight [n, k], columns or None without calibration) -> score [n, k]`, float32 or wider."""


def with_statistic(score: Score, statistic: Tensor) -> Score:
    """The score of one matrix whose columns also carry `statistic`, `[n, k]` of all of them."""

    def bound(weight: Tensor, columns: Columns | None) -> Tensor:
        known = Columns(None) if columns is None else columns
        mine = statistic[:, known.start : known.start + weight.shape[1]]
        return score(
            weight,
            Columns(known._norms, lambda: known.inverse_diagonal, mine, known.start),
        )

    return bound


# --- from the weights and inputs of one layer ---------------------------------------------------


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


# --- from gradients of the loss: statistics of `gradients.py` -----------------------------------


def snip(weight: Tensor, columns: Columns | None) -> Tensor:
    """`|W · mean g|`, SNIP's connection sensitivity (Lee et al. 2019, arXiv 1810.02340).

    How fast the mean loss over all batches changes when the weight is scaled. For networks before
    training: where training has ended, that gradient is close to zero for every weight.
    """
    assert columns is not None
    return (weight * columns.statistic).abs()


def taylor(weight: Tensor, columns: Columns | None) -> Tensor:
    """`|W| · mean |g|`, first-order Taylor expansion (Molchanov et al. 2017, arXiv 1611.06440).

    The change of the loss that zeroing the weight causes to first order, its absolute value taken
    for each batch and then averaged. That is where it differs from SNIP: gradients of opposite
    signs do not cancel, so it also ranks the weights of a trained network. On one batch both are
    the same. Molchanov et al. 2019 (arXiv 1906.10771) average its square: for single weights that
    is `fisher`.
    """
    assert columns is not None
    return weight.abs() * columns.statistic


def fisher(weight: Tensor, columns: Columns | None) -> Tensor:
    """W² · mean g²: optimal brain damage with the diagonal of the empirical Fisher information.

    LeCun et al. 1990 ("Optimal Brain Damage") rank by w²·h/2, h the diagonal of the Hessian;
    Theis et al. 2018 (arXiv 1801.05787) put the mean of squared gradients in its place. Gradients
    are those of whole batches: batches of one example give the Fisher information of examples,
    larger ones a cheaper and smoother stand-in.
    """
    assert columns is not None
    return weight.square() * columns.statistic


# --- from a statistic alone ----------------------------------------------------------------------


def given(weight: Tensor, columns: Columns | None) -> Tensor:
    """The statistic as it is; weights that share a value are ranked by `|W|`.

    The share of `|W|` is a millionth: it decides inside a group of N:M, and among the blocks of one
    filter, without changing the order of filters.
    """
    assert columns is not None
    size = weight.abs().double()
    largest = size.max().clamp_min(torch.finfo(size.dtype).tiny)
    return columns.statistic * (1.0 + _TIE * (size / largest))


@dataclass(frozen=True)
class Unpruned:
    """What a statistic may read: the model before any of its layers is pruned.

    Attributes:
        module: as the caller gave it.
        layers: name -> the layer to prune and its pattern.
        batches: the calibration batches; empty without calibration.
        seed: `prune`'s seed.
        together: whether layers that share a pattern also share what it keeps, so that scores are
            compared between them; otherwise each keeps what its own pattern says.
    """

    module: nn.Module
    layers: Mapping[str, tuple[Layer, Pattern]]
    batches: Sequence[Batch] = ()
    seed: int = 0
    together: bool = False


Statistic: TypeAlias = Callable[[Unpruned], dict[str, Tensor]]
"""Layer name -> tensor of its weight's shape. A layer that is left out stays model."""


def random_numbers(model: Unpruned) -> dict[str, Tensor]:
    """Uniform numbers: which weights go is left to chance, how many is not.

    With each layer's share chosen well ("erk"), random pruning before training comes close to
    methods that look at the network (Liu et al. 2022, arXiv 2202.02643). Needs nothing. Depends on
    the seed and the layer's name alone, not on torch's global generator or on other layers.
    """
    out = {}
    for name, (layer, _) in model.layers.items():
        digest = hashlib.sha256(f"{model.seed}:{name}".encode()).digest()
        make = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        out[name] = 1.0 - torch.rand(layer.weight.shape, generator=make)
    return out


def filter_distances(model: Unpruned) -> dict[str, Tensor]:
    """Each filter's summed distance to the others, FPGM (He et al. 2019, arXiv 1811.00250).

    Filters near the geometric median of their layer are the ones that the rest can stand in for:
    they have the smallest sum and go first, however large they are. A filter is a row of a linear
    layer or convolution; in grouped convolutions it is compared with those that read the same
    channels. Every weight of a filter scores the same, so block patterns drop filters, as many
    rows at a time as a block is high. The rows of an N:M group do not compete: there `|W|` decides,
    and with vectors the rows that share positions count alike.

    Needs no data; n²k operations for a layer.
    """
    out = {}
    for name, (layer, _) in model.layers.items():
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        rows = layer.weight.detach().to(dtype).reshape(layer.groups, -1, layer.weight[0].numel())
        sums = [
            torch.cat([torch.cdist(part, group).sum(1) for part in group.split(_ROWS)])
            for group in rows
        ]
        out[name] = _spread(torch.cat(sums), layer)
    return out


def stripe_norms(model: Unpruned) -> dict[str, Tensor]:
    """The L1 norm of each stripe: one tap of one filter, over all the channels it reads.

    Pruning filter in filter (Meng et al. 2020, arXiv 2009.14410), with the stripe's norm in place
    of the filter skeleton that the paper trains. Every weight of a stripe scores the same, so
    block patterns drop stripes, as many rows at a time as a block is high; inside a stripe, where
    N:M chooses, `|W|` decides. A linear layer or a 1x1 convolution has one stripe to a row.

    Needs no data; costs about as much as magnitude.
    """
    out = {}
    for name, (layer, _) in model.layers.items():
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        out[name] = _spread(layer.weight.detach().to(dtype).abs().sum(1), layer)
    return out


def _spread(values: Tensor, layer: Layer) -> Tensor:
    """`[n]` or `[n, *taps]` for every weight, without a copy."""
    shape = layer.weight.shape
    if values.dim() == 1:
        return values.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return values.unsqueeze(1).expand(shape)
