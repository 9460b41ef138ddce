"""Measuring an older instruction set than the machine has: ours and the rivals' limited alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

LIMITS = {
    "avx2": {
        "SPARSEKIT_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NM_ARCH": "avx2",  # DeepSparse
    },
}
"""Environment variables by instruction set."""


def limit(isa: str, module: str, arguments: Sequence[str]) -> None:
    """Starts this program anew under a limit, unless it already runs under it.

    The libraries read these variables when they are loaded, which is before this is called.

    Args:
        isa: A key of `LIMITS`.
        module: What `python -m` runs.
        arguments: Of the command.
    """
    wanted = LIMITS[isa]
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    sys.stdout.flush()
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, {**os.environ, **wanted})
