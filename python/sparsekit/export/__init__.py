"""Models for other engines: `sk.export.onnx`, and how to run its files on a CPU.

Needs the extra `onnx`, which is imported by the first call.
"""

from __future__ import annotations

from typing import Any

from sparsekit.export.api import onnx
from sparsekit.export.packages import require_onnx
from sparsekit.export.plugin import plugin_path
from sparsekit.export.quick import register_quick_plugins
from sparsekit.export.report import ExportReport, ExportRow

__all__ = [
    "ExportReport",
    "ExportRow",
    "onnx",
    "plugin_path",
    "reference_ops",
    "register_quick_plugins",
    "register_schemas",
]


def reference_ops() -> list[Any]:
    """Our nodes for ONNX's reference evaluator, as `onnx.reference.op_run.OpRun` classes.

    They unpack the weights, pack them for this CPU and run this library's kernels:
    `onnx.reference.ReferenceEvaluator("model.onnx", new_ops=sk.export.reference_ops())`.

    Raises:
        ImportError: the extra `onnx` is not installed.
    """
    require_onnx("reference_ops")
    from sparsekit.export.reference import SparseConv2d, SparseLinear, SparseLinearQuick

    return [SparseLinear, SparseConv2d, SparseLinearQuick]


def register_schemas() -> None:
    """Tell this process's ONNX about our nodes: `onnx.checker` and `onnx.shape_inference` use it.

    `sparsekit.export.onnx` calls it. Calling it again does nothing.

    Raises:
        ImportError: the extra `onnx` is not installed.
    """
    require_onnx("register_schemas")
    from sparsekit.export import schema

    schema.register()
