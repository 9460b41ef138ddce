"""One layer after the other: what every way to prune at once does with each of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsekit.patterns import Pattern
from sparsekit.prune.calibration import Calibration
from sparsekit.prune.layers import Layer
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.reconstruct import (
    RECONSTRUCTIONS,
    Reconstruction,
    ReconstructionOptions,
    reconstruct,
    relative_error,
)
from sparsekit.prune.report import PrunedLayer
from sparsekit.prune.scores import Score

PruneLayer: TypeAlias = "Callable[[Layer, Pattern, Tensor | None], None]"
"""Prunes one layer in place, given the second moments of its inputs where there are any."""


def choose_method(
    method: str, reconstruction: str | None, calibrated: bool
) -> tuple[Method, str, Reconstruction]:
    """The method, and the name and function of its reconstruction.

    Raises:
        ValueError: unknown, or calibration missing where it is needed.
    """
    chosen: Method = _lookup(METHODS, method, "method")
    name = chosen.reconstruction if reconstruction is None else reconstruction
    solve: Reconstruction = _lookup(RECONSTRUCTIONS, name, "reconstruction")
    if not calibrated and (chosen.needs_calibration or name != "none"):
        raise ValueError(
            f"prune: method {method!r} with reconstruction {name!r} needs calibration data; pass "
            "calibration=batches, or use method='magnitude'"
        )
    return chosen, name, solve


def check_weight(layer: Layer) -> None:
    """Refuse a weight that is empty or not finite.

    Raises:
        ValueError: it is.
    """
    weight = layer.weight
    if weight.numel() == 0:
        raise ValueError(
            f"prune: the weight of {layer.name!r} is empty {list(weight.shape)}; "
            "leave it out with ignore="
        )
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"prune: the weight of {layer.name!r} holds {bad} NaN or infinite values; "
            "repair the checkpoint or leave the layer out with ignore="
        )


class Run:
    """Layers pruned by one method, one after the other.

    Args:
        patterns: of each layer, by its name.
        score: ranks the weights.
        solve: reconstruction.
        options: of that.
        statistics: what the score reads of the whole model, by layer.

    Attributes:
        done: the layers, in the order they were done.
        masks: their masks, by name.
    """

    def __init__(
        self,
        patterns: Mapping[str, Pattern],
        score: Score,
        solve: Reconstruction,
        options: ReconstructionOptions,
        statistics: Mapping[str, Tensor],
    ) -> None:
        self.done: list[PrunedLayer] = []
        self.masks: dict[str, Tensor] = {}
        self._patterns = patterns
        self._score = score
        self._statistics = statistics
        self._solve = solve
        self._options = options

    def prune(self, layer: Layer, moments: Tensor | None) -> None:
        """Prune one layer, with the second moments `[groups, k, k]` of its inputs or without."""
        started = time.perf_counter()
        wanted = self._patterns[layer.name]
        weight = layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        before = layer.matrices(weight.to(dtype, copy=True), wanted)
        if moments is not None:
            moments = layer.pad_moments(moments, wanted)
        statistic = self._statistics.get(layer.name)
        if statistic is not None:
            statistic = layer.matrices(statistic.to(weight.device), wanted)
        try:
            after, mask = reconstruct(
                self._solve, before, wanted, self._score, moments, self._options, statistic
            )
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"prune: the inputs of layer {layer.name!r} are too alike to invert their second "
                f"moment with dampening={self._options.dampening}; raise it, or pass more "
                "calibration data"
            ) from error
        weight.copy_(layer.from_matrices(after))
        self.masks[layer.name] = layer.from_matrices(mask)
        lost = None
        if moments is not None:
            lost = relative_error(before, layer.matrices(weight.to(dtype), wanted), moments)
        reason = f"{wanted} keeps all of it" if bool(self.masks[layer.name].all()) else ""
        seconds = time.perf_counter() - started
        self.done.append(describe(layer.name, weight, wanted, lost, reason, seconds))


def layer_pruner(
    method: Method,
    solve: Reconstruction,
    options: ReconstructionOptions,
    statistics: Callable[[Pattern], Mapping[str, Tensor]],
) -> PruneLayer:
    """Prunes one layer by itself, to see what comes of it.

    Args:
        method: its score.
        solve: reconstruction.
        options: of that.
        statistics: the method's, for a pattern.
    """

    def prune_layer(layer: Layer, wanted: Pattern, moments: Tensor | None) -> None:
        run = Run({layer.name: wanted}, method.score, solve, options, statistics(wanted))
        run.prune(layer, moments)

    return prune_layer


def require_groups(calibration: Calibration) -> None:
    """Refuse calibration that reaches none of the layers.

    Raises:
        ValueError: it does.
    """
    if not calibration.groups:
        some = ", ".join(repr(layer.name) for layer in calibration.unreached[:5])
        raise ValueError(
            f"prune: no calibration batch runs any of the layers to prune ({some}); check that "
            "the batches go through them"
        )


def warn_of_few(tokens: Mapping[str, int], layers: Iterable[Layer], stacklevel: int) -> None:
    """One warning for all layers whose second moment cannot have full rank."""
    needed = {layer.name: layer.weight.shape[1:].numel() for layer in layers}
    short = [name for name, count in tokens.items() if count < needed[name]]
    if short:
        worst = min(short, key=lambda name: tokens[name] / needed[name])
        others = f" ({len(short) - 1} more layers lack some too)" if len(short) > 1 else ""
        warnings.warn(
            f"prune: layer {worst!r} saw {tokens[worst]} calibration tokens or patches, and the "
            f"second moment of its inputs needs at least {needed[worst]}{others}: dampening makes "
            "up for the rest; pass more calibration data",
            UserWarning,
            stacklevel=stacklevel,
        )


def describe(
    name: str,
    weight: Tensor,
    pattern: Pattern | None,
    error: float | None = None,
    reason: str = "",
    seconds: float = 0.0,
) -> PrunedLayer:
    """A line of the report."""
    zeros = 1.0 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0
    shape = tuple(weight.shape)
    spelling = None if pattern is None else str(pattern)
    return PrunedLayer(name, shape, spelling, zeros, error, reason, seconds)


def _lookup(registry: dict[str, Any], name: str, what: str) -> Any:
    try:
        return registry[name]
    except KeyError:
        raise ValueError(
            f"prune: unknown {what} {name!r}; known are {', '.join(sorted(registry))}"
        ) from None
