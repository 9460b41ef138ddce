"""The optional packages that write and read ONNX."""

from __future__ import annotations

import importlib.util

import torch

_NEEDED = ("onnx", "onnxscript", "ml_dtypes")
# Earlier exporters drop the names of dynamic sizes, and those of modules on the way to opset 20.
_TORCH = (2, 9)


def require_onnx(what: str) -> None:
    """Check that the extra `onnx` is installed.

    Args:
        what: who asks; begins the message.

    Raises:
        ImportError: names what is missing and the command that installs it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{what}: needs {', '.join(missing)}, which this Python does not have; "
            'run pip install "sparsekit-kernels[onnx]"'
        )


def require_exporter(what: str) -> None:
    """Check that torch can export our operators.

    Raises:
        ImportError: torch is too old.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _TORCH:
        raise ImportError(
            f"{what}: needs torch {_TORCH[0]}.{_TORCH[1]} or later, this is {torch.__version__}"
        )
