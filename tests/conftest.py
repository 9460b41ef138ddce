"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Thousands of tiny parallel regions: threads that sleep between them cost less than threads that
# spin, above all on a busy machine. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench.vision import import_torchvision

import_torchvision()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's verdict cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
