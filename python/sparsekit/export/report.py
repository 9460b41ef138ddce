"""What an export wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.dispatch import table
from sparsekit.patterns import Pattern

if TYPE_CHECKING:
    from sparsekit.export.calls import Call


@dataclass(frozen=True)
class ExportRow:
    """One call of a sparse layer, and the node that stands for it.

    Attributes:
        layer: dotted name of the module, or of the result where a function was called.
        node: `"SparseLinear"`, `"SparseConv2d"`; of a dense export `"MatMul"` or `"Conv"`.
        pattern: spelling of the weight's pattern.
        dtype: of the values, e.g. `"float32"`; `"int8"` where the export quantised them.
        format: of the weight: `"canonical"`, a format for GPUs, or `"dense"`.
        nbytes: of the node's constant; layers that share one name it each.
        activation: what the layer does after its bias, or None.
        residual: whether it adds another value.
    """

    layer: str
    node: str
    pattern: str
    dtype: str
    format: str
    nbytes: int
    activation: str | None
    residual: bool


def row_of(
    call: Call, node: str, pattern: Pattern, dtype: torch.dtype, format: str, constant: Any
) -> ExportRow:
    """The row of a call whose weight is `constant`, a value of the graph."""
    return ExportRow(
        call.layer,
        node,
        str(pattern),
        str(dtype).removeprefix("torch."),
        format,
        int(constant.const_value.nbytes),
        call.activation,
        call.residual is not None,
    )


@dataclass(frozen=True)
class ExportReport:
    """What `sparsekit.export.onnx` wrote; `str()` is a table.

    Attributes:
        path: the file.
        nbytes: its size, with that of its external data.
        external_data: the file beside it that holds its constants, or None.
        rows: one for each call of a sparse layer, in the graph's order.
        absent: sparse modules of the model that the graph does not call.
        inputs: of the graph, each as `"name: float16 [batch, 3, 224, 224]"`.
    """

    path: Path
    nbytes: int
    external_data: Path | None
    rows: list[ExportRow]
    absent: list[str]
    inputs: list[str]

    def __str__(self) -> str:
        head = ("layer", "node", "pattern", "dtype", "format", "MB", "epilogue")
        rows = [
            (
                row.layer or "(the model)",
                row.node,
                row.pattern,
                row.dtype,
                row.format,
                f"{row.nbytes / 1e6:.3f}",
                " + ".join(filter(None, (row.activation, "residual" if row.residual else None)))
                or "-",
            )
            for row in self.rows
        ]
        where = "" if self.external_data is None else f" with {self.external_data.name}"
        lines = [table(head, rows)] if rows else []
        lines += [f"not called by the graph: {name}" for name in self.absent]
        lines += [f"input {each}" for each in self.inputs]
        lines.append(f"{self.path}{where}: {len(rows)} sparse layers, {self.nbytes / 1e6:.2f} MB")
        return "\n".join(lines)
