"""The registry of methods of sparse training: one line each."""

from __future__ import annotations

from collections.abc import Callable

from sparsekit.prune.training.base import TrainingMethod
from sparsekit.prune.training.dsa import DSA
from sparsekit.prune.training.dynamic import SET, RigL
from sparsekit.prune.training.gradual import Gradual
from sparsekit.prune.training.group_lasso import GroupLasso
from sparsekit.prune.training.sr_ste import SRSTE

TRAINING_METHODS: dict[str, Callable[..., TrainingMethod]] = {
    "gradual": Gradual,
    "rigl": RigL,
    "set": SET,
    "sr_ste": SRSTE,
    "group_lasso": GroupLasso,
    "dsa": DSA,
}
"""Every method of `train_sparse` by name. Its keyword arguments are the method's options."""
