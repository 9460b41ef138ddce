"""timm without a working torchvision."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

# The operators stay declared as long as this lives.
_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Imports torchvision, declaring its operators where its native library cannot be loaded.

    timm needs torchvision's Python code, which cannot be imported where that library was built for
    another torch (a CUDA wheel beside a CPU torch): the operators are missing that it describes.
    Declaring them is enough, since no model calls them.
    """
    found: object = sys.modules.get("torchvision", torch)
    if found is None:
        del sys.modules["torchvision"]  # hidden from transformers, which has looked by now
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # A module that failed half way is forgotten.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def import_timm() -> Any:
    """timm, whatever torchvision is installed."""
    import_torchvision()
    return importlib.import_module("timm")
