"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Thousands of tiny parallel regions: threads that sleep between them cost less than threads that
# spin, above all on a busy machine. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nor does a test depend on what was tuned on this machine, which is read by the import.
os.environ["SPARSEKIT_TUNED"] = "0"

from bench.vision import import_torchvision

import_torchvision()


def _why_no_gpu() -> str:
    import torch

    from sparsekit import _native

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    on_gpu = [kernel for kernel in _native.kernels() if kernel.device == "cuda"]
    if any(kernel.available for kernel in on_gpu):
        return ""
    return _native.cuda_unavailable_reason() or on_gpu[0].reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say why they do not run."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
