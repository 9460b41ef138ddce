"""The registry of pruning methods: one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsekit.prune import gradients, scores
from sparsekit.prune.scores import Score, Statistic
from sparsekit.prune.synflow import synflow


@dataclass(frozen=True)
class Method:
    """A score, what it needs, and the reconstruction it is published with.

    Attributes:
        score: ranks the weights.
        needs: "nothing", "inputs" (calibration batches) or "gradients" (calibration batches and a
            loss).
        statistic: made of the whole model before any layer is pruned; its part of a layer is
            `columns.statistic` of the score.
        correlations: whether the score reads the inputs' second moment beyond its diagonal, for
            which a layer must see as many tokens as it has columns.
        reconstruction: name in `RECONSTRUCTIONS`; `prune(..., reconstruction=...)` overrides it.
    """

    score: Score
    needs: Literal["nothing", "inputs", "gradients"] = "nothing"
    statistic: Statistic | None = None
    correlations: bool = False
    reconstruction: str = "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether `prune` must be given calibration batches."""
        return self.needs != "nothing"

    @property
    def reads_inputs(self) -> bool:
        """Whether the score reads the inputs of a layer, and no statistic made beforehand."""
        return self.needs == "inputs" and self.statistic is None


METHODS: dict[str, Method] = {
    "magnitude": Method(scores.magnitude),
    "random": Method(scores.given, statistic=scores.random_numbers),
    "wanda": Method(scores.wanda, "inputs"),
    "sparsegpt": Method(
        scores.optimal_brain_surgeon, "inputs", correlations=True, reconstruction="sweep"
    ),
    "admm": Method(scores.wanda, "inputs", reconstruction="admm"),
    "taylor": Method(scores.taylor, "gradients", gradients.mean_absolute),
    "fisher": Method(scores.fisher, "gradients", gradients.mean_square),
    "snip": Method(scores.snip, "gradients", gradients.mean),
    "synflow": Method(scores.given, "inputs", synflow),
    "fpgm": Method(scores.given, statistic=scores.filter_distances),
    "stripes": Method(scores.given, statistic=scores.stripe_norms),
}
"""Every pruning method by name. Add one by writing its score and a line here."""
