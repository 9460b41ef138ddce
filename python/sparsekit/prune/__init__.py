"""Pruning: score → mask → reconstruction → recovery, each an independent choice.

The attribute `sparsekit.prune` is the function, bound in `sparsekit/__init__.py` after this package;
everything else here is reached by `from sparsekit.prune import ...`.
"""

from __future__ import annotations

from sparsekit.prune.api import prune
from sparsekit.prune.masks import HeldMasks, hold_masks
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.reconstruct import RECONSTRUCTIONS
from sparsekit.prune.recover import LOSSES, DistillReport, distill
from sparsekit.prune.report import PrunedLayer, PruneReport

__all__ = [
    "LOSSES",
    "METHODS",
    "RECONSTRUCTIONS",
    "DistillReport",
    "HeldMasks",
    "Method",
    "PruneReport",
    "PrunedLayer",
    "distill",
    "hold_masks",
    "prune",
]
