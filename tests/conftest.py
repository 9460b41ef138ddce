"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Thousands of tiny parallel regions: threads that sleep between them cost less than threads that
# spin, above all on a busy machine. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# timm needs torchvision's Python code, which cannot be imported where its native library was built
# for another torch (a CUDA wheel beside a CPU torch): the operators are missing that it describes.
# Declaring them is enough, since no test calls them. A module that failed half way is forgotten.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _torchvision = torch.library.Library("torchvision", "DEF")
    _torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's verdict cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
