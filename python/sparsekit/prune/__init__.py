"""Pruning: score → mask → reconstruction → recovery, each an independent choice.

`sparsekit.prune` is this package and can be called: `sparsekit.prune(model, "2:4")` is
`sparsekit.prune.prune(model, "2:4")`.
"""

from __future__ import annotations

import inspect
import sys
import types

from sparsekit.prune.allocation.allocate import ALLOCATIONS, OWL, Sensitivity
from sparsekit.prune.allocation.latency import LatencyPlan, plan_latency
from sparsekit.prune.allocation.scan import SensitivityReport, SensitivityRow
from sparsekit.prune.allocation.sensitivity import sensitivity
from sparsekit.prune.api import prune
from sparsekit.prune.disk.streaming import prune_file
from sparsekit.prune.masks import HeldMasks, hold_masks, load_masks, save_masks
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.permutation.api import PermutedLayer, PermuteReport, permute
from sparsekit.prune.permutation.by_hand import find_permutation, kept_share, permute_channels
from sparsekit.prune.reconstruct import RECONSTRUCTIONS
from sparsekit.prune.recovery.batchnorm import update_batchnorm
from sparsekit.prune.recovery.blocks import BlocksReport, ReconstructedBlock, reconstruct_blocks
from sparsekit.prune.recovery.distill import LOSSES, DistillReport, distill
from sparsekit.prune.report import PrunedLayer, PruneReport
from sparsekit.prune.structured import PrunedGroup, StructuredReport, prune_structured
from sparsekit.prune.training import TRAINING_METHODS, SparseTraining, train_sparse
from sparsekit.prune.training.lottery import find_lottery_ticket

__all__ = [
    "ALLOCATIONS",
    "LOSSES",
    "METHODS",
    "OWL",
    "RECONSTRUCTIONS",
    "TRAINING_METHODS",
    "BlocksReport",
    "DistillReport",
    "HeldMasks",
    "LatencyPlan",
    "Method",
    "PermuteReport",
    "PermutedLayer",
    "PruneReport",
    "PrunedGroup",
    "PrunedLayer",
    "ReconstructedBlock",
    "Sensitivity",
    "SensitivityReport",
    "SensitivityRow",
    "SparseTraining",
    "StructuredReport",
    "distill",
    "find_lottery_ticket",
    "find_permutation",
    "hold_masks",
    "kept_share",
    "load_masks",
    "permute",
    "permute_channels",
    "plan_latency",
    "prune",
    "prune_file",
    "prune_structured",
    "reconstruct_blocks",
    "save_masks",
    "sensitivity",
    "train_sparse",
    "update_batchnorm",
]


class _CallablePackage(types.ModuleType):
    __call__ = staticmethod(prune)
    __signature__ = inspect.signature(prune)


# Importing a submodule binds `sparsekit.prune` to this package, so the package itself must be
# callable for `sk.prune(...)` to work whatever was imported before.
sys.modules[__name__].__class__ = _CallablePackage
