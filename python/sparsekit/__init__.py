"""Pruned PyTorch models that really run faster: patterns, packed weights, kernels, modules."""

from typing import TYPE_CHECKING

from sparsekit import nn
from sparsekit.convert import ConvertReport, convert
from sparsekit.dispatch import explain, kernels
from sparsekit.functional import linear
from sparsekit.io import FileSummary, inspect, load, save
from sparsekit.pack import PackedWeight, detect, mask, pack
from sparsekit.patterns import NM, BlockSparse, Pattern, parse_pattern
from sparsekit.prune import PruneReport

if TYPE_CHECKING:
    from sparsekit.prune import prune
else:
    # The package itself, which can be called: `sk.prune(...)` and `sk.prune.distill(...)`.
    from sparsekit import prune

__all__ = [
    "NM",
    "BlockSparse",
    "ConvertReport",
    "FileSummary",
    "PackedWeight",
    "Pattern",
    "PruneReport",
    "convert",
    "detect",
    "explain",
    "inspect",
    "kernels",
    "linear",
    "load",
    "mask",
    "nn",
    "pack",
    "parse_pattern",
    "prune",
    "save",
]
