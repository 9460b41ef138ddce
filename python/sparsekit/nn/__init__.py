"""Sparse modules that take the place of dense ones."""

from sparsekit.nn.conv import SparseConv1d, SparseConv2d
from sparsekit.nn.fused import FoldedBatchNorm, FusedActivation
from sparsekit.nn.linear import SparseLinear

__all__ = ["FoldedBatchNorm", "FusedActivation", "SparseConv1d", "SparseConv2d", "SparseLinear"]
