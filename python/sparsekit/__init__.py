"""Pruned PyTorch models that really run faster: patterns, packed weights, kernels, modules."""

from sparsekit import nn
from sparsekit.convert import ConvertReport, convert
from sparsekit.dispatch import explain, kernels
from sparsekit.functional import linear
from sparsekit.pack import PackedWeight, detect, mask, pack
from sparsekit.patterns import NM, BlockSparse, Pattern, parse_pattern

__all__ = [
    "NM",
    "BlockSparse",
    "ConvertReport",
    "PackedWeight",
    "Pattern",
    "convert",
    "detect",
    "explain",
    "kernels",
    "linear",
    "mask",
    "nn",
    "pack",
    "parse_pattern",
]
