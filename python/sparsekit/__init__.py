"""Pruned PyTorch models that really run faster: patterns, packed weights, kernels, modules."""

from typing import TYPE_CHECKING

import torch

from sparsekit import export, interop, nn, preferences
from sparsekit.codebook import Compression
from sparsekit.compress import CompressionReport, apply_codebooks, compression_report
from sparsekit.convert import ConvertReport, convert
from sparsekit.dispatch import TuneReport, explain, kernels, tune
from sparsekit.functional import conv1d, conv2d, linear
from sparsekit.io import inspect, load, save
from sparsekit.pack import PackedWeight, detect, mask, pack
from sparsekit.patterns import NM, BlockSparse, Pattern, parse_pattern
from sparsekit.prune import PruneReport
from sparsekit.summary import FileSummary

if TYPE_CHECKING:
    from sparsekit.prune import prune
else:
    # The package itself, which can be called: `sk.prune(...)` and `sk.prune.distill(...)`.
    from sparsekit import prune

__all__ = [
    "NM",
    "BlockSparse",
    "Compression",
    "CompressionReport",
    "ConvertReport",
    "FileSummary",
    "PackedWeight",
    "Pattern",
    "PruneReport",
    "TuneReport",
    "apply_codebooks",
    "compression_report",
    "conv1d",
    "conv2d",
    "convert",
    "detect",
    "explain",
    "export",
    "inspect",
    "interop",
    "kernels",
    "linear",
    "load",
    "mask",
    "nn",
    "pack",
    "parse_pattern",
    "prune",
    "save",
    "tune",
]

# GPUs follow with their first call: to ask what they are starts the driver.
preferences.load(torch.device("cpu"))
