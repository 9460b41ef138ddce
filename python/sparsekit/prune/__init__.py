"""Pruning: score → mask → reconstruction → recovery, each an independent choice.

`sparsekit.prune` is this package and can be called: `sparsekit.prune(model, "2:4")` is
`sparsekit.prune.prune(model, "2:4")`.
"""

from __future__ import annotations

import inspect
import sys
import types

from sparsekit.prune.api import prune
from sparsekit.prune.lottery import find_lottery_ticket
from sparsekit.prune.masks import HeldMasks, hold_masks, load_masks, save_masks
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.permute import find_permutation, kept_share, permute_channels
from sparsekit.prune.reconstruct import RECONSTRUCTIONS
from sparsekit.prune.recover import LOSSES, DistillReport, distill
from sparsekit.prune.report import PrunedLayer, PruneReport
from sparsekit.prune.streaming import prune_file
from sparsekit.prune.training import TRAINING_METHODS, SparseTraining, train_sparse

__all__ = [
    "LOSSES",
    "METHODS",
    "RECONSTRUCTIONS",
    "TRAINING_METHODS",
    "DistillReport",
    "HeldMasks",
    "Method",
    "PruneReport",
    "PrunedLayer",
    "SparseTraining",
    "distill",
    "find_lottery_ticket",
    "find_permutation",
    "hold_masks",
    "kept_share",
    "load_masks",
    "permute_channels",
    "prune",
    "prune_file",
    "save_masks",
    "train_sparse",
]


class _CallablePackage(types.ModuleType):
    __call__ = staticmethod(prune)
    __signature__ = inspect.signature(prune)


# Importing a submodule binds `sparsekit.prune` to this package, so the package itself must be
# callable for `sk.prune(...)` to work whatever was imported before.
sys.modules[__name__].__class__ = _CallablePackage
