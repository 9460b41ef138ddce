"""The registry of pruning methods: one line each."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekit.prune import scores
from sparsekit.prune.scores import Score


@dataclass(frozen=True)
class Method:
    """A score, and the reconstruction it is published with.

    Attributes:
        score: ranks the weights.
        needs_calibration: whether the score reads input statistics.
        reconstruction: name in `RECONSTRUCTIONS`; `prune(..., reconstruction=...)` overrides it.
    """

    score: Score
    needs_calibration: bool = False
    reconstruction: str = "none"


METHODS: dict[str, Method] = {
    "magnitude": Method(scores.magnitude),
    "wanda": Method(scores.wanda, needs_calibration=True),
    "sparsegpt": Method(
        scores.optimal_brain_surgeon, needs_calibration=True, reconstruction="sweep"
    ),
}
"""Every pruning method by name. Add one by writing its score and a line here."""
