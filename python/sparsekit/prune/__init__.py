"""Pruning: score → mask → reconstruction → recovery, each an independent choice.

`sparsekit.prune` is this package and can be called: `sparsekit.prune(model, "2:4")` is
`sparsekit.prune.prune(model, "2:4")`.
"""

from __future__ import annotations

import inspect
import sys
import types

from sparsekit.prune.api import prune
from sparsekit.prune.masks import HeldMasks, hold_masks
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.permute import find_permutation, kept_share, permute_channels
from sparsekit.prune.reconstruct import RECONSTRUCTIONS
from sparsekit.prune.recover import LOSSES, DistillReport, distill
from sparsekit.prune.report import PrunedLayer, PruneReport
from sparsekit.prune.streaming import prune_file

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
    "find_permutation",
    "hold_masks",
    "kept_share",
    "permute_channels",
    "prune",
    "prune_file",
]


class _CallablePackage(types.ModuleType):
    __call__ = staticmethod(prune)
    __signature__ = inspect.signature(prune)


# Importing a submodule binds `sparsekit.prune` to this package, so the package itself must be
# callable for `sk.prune(...)` to work whatever was imported before.
sys.modules[__name__].__class__ = _CallablePackage
