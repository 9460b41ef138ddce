"""What `prune` did, layer by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class PrunedLayer:
    """One layer of a `PruneReport`.

    Attributes:
        name: dotted module name.
        shape: of the weight, (out_features, in_features) or (out_channels, in_channels / groups)
            and the kernel's sizes.
        pattern: the pattern's spelling, None when the layer stayed dense.
        sparsity: fraction of zeros in the weight.
        error: ‖(W - W')X‖ / ‖WX‖ over the calibration inputs; None without calibration.
        reason: why it stayed dense, or what else is worth knowing.
        seconds: time to choose its mask and values, without the calibration before it.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    sparsity: float
    error: float | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class PruneReport:
    """Result of `prune`. `print(report)` shows a table, one line per layer.

    Attributes:
        method: name of the method.
        reconstruction: name of the reconstruction.
        layers: one entry per layer, pruned or not, in the order they were done.
        masks: module name -> bool of the weight's shape, True = kept, for the pruned layers.
        seconds: wall time.
    """

    method: str
    reconstruction: str
    layers: tuple[PrunedLayer, ...]
    masks: Mapping[str, Tensor] = field(repr=False)
    seconds: float

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned layers."""
        pruned = [layer for layer in self.layers if layer.pattern is not None]
        total = sum(math.prod(layer.shape) for layer in pruned)
        return sum(layer.sparsity * math.prod(layer.shape) for layer in pruned) / max(total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, as plain values for JSON."""
        return {
            "method": self.method,
            "reconstruction": self.reconstruction,
            "seconds": self.seconds,
            "sparsity": self.sparsity,
            "layers": [vars(layer) | {"shape": list(layer.shape)} for layer in self.layers],
        }

    def __rich__(self) -> RenderableType:
        table = Table()
        for heading in ("layer", "shape", "pattern"):
            table.add_column(heading, overflow="fold")
        table.add_column("zeros", justify="right")
        table.add_column("error", justify="right")
        table.add_column("note", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name or "(model)",
                "x".join(map(str, layer.shape)),
                layer.pattern or "dense",
                f"{layer.sparsity:.1%}",
                "" if layer.error is None else f"{layer.error:.4f}",
                layer.reason,
            )
        summary = (
            f"{self.method}, reconstruction {self.reconstruction}: {len(self.masks)} layers "
            f"pruned, {self.sparsity:.1%} zeros, {self.seconds:.1f} s"
        )
        return Group(summary, table)

    def __str__(self) -> str:
        return as_text(self)


def as_text(report: RenderableType, width: int = 110) -> str:
    """What `print(report)` shows: plain text, the same wherever it goes."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(report)
    return buffer.getvalue().rstrip()
