"""Sparse modules that take the place of dense ones."""

from sparsekit.nn.conv import SparseConv1d, SparseConv2d
from sparsekit.nn.fused import FoldedBatchNorm, FusedActivation
from sparsekit.nn.linear import SparseLinear
from sparsekit.nn.packed import PackedModule
from sparsekit.nn.residual import fuse_residuals

__all__ = [
    "FoldedBatchNorm",
    "FusedActivation",
    "PackedModule",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "fuse_residuals",
]
