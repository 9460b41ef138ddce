"""Sparse modules that take the place of dense ones."""

from sparsekit.nn.conv import SparseConv1d, SparseConv2d
from sparsekit.nn.fused import FoldedBatchNorm, FusedActivation
from sparsekit.nn.linear import SparseLinear
from sparsekit.nn.packed import PackedModule

__all__ = [
    "FoldedBatchNorm",
    "FusedActivation",
    "PackedModule",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
]
