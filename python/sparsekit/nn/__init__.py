"""Sparse modules that take the place of dense ones."""

from sparsekit.nn.fused import FusedActivation
from sparsekit.nn.linear import SparseLinear

__all__ = ["FusedActivation", "SparseLinear"]
