"""Training that ends in a sparse model: one file per family of methods, all on the same patterns.

`api.py` hooks a method into a plain training loop; `base.py` says what a method is made of.
"""

from sparsekit.prune.training.api import SparseTraining, train_sparse
from sparsekit.prune.training.methods import TRAINING_METHODS

__all__ = ["TRAINING_METHODS", "SparseTraining", "train_sparse"]
