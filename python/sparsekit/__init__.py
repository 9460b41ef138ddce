"""Pruned PyTorch models that really run faster: patterns, packed weights, kernels, modules."""

from sparsekit.patterns import NM, BlockSparse, Pattern, parse_pattern

__all__ = ["NM", "BlockSparse", "Pattern", "parse_pattern"]
