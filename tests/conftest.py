"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's verdict cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
