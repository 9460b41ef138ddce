"""What a file says of its layers, and the table that `inspect` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sparsekit._ops import ACTIVATIONS
from sparsekit.codebook import PARTS as CODED_PARTS
from sparsekit.codebook import Coding
from sparsekit.dispatch import table
from sparsekit.filters import FilterShape
from sparsekit.pack import DTYPES, PackedWeight
from sparsekit.patterns import Pattern, parse_pattern

CANONICAL_PARTS = ("values", "indices", "crow_indices")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class LayerEntry:
    """What a file says of one sparse layer.

    Attributes:
        pattern: of its weight.
        shape: (n, k) of the matrix that is stored.
        dtype: of the values.
        activation: fused into the layer.
        filters: of a convolution, whose matrix is stored (`sparsekit.filters`); else None.
        coding: of values that are shared and coded (`sparsekit.codebook`); else None.
    """

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: str | None
    filters: FilterShape | None = None
    coding: Coding | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the file's metadata."""
        entry: dict[str, Any] = {
            "pattern": str(self.pattern),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "activation": self.activation,
        }
        if self.filters is not None:
            entry["filters"] = {"weight": self.weight_shape, "groups": self.filters.groups}
        if self.coding is not None:
            entry["coding"] = self.coding.to_json()
        return entry

    @classmethod
    def from_json(cls, entry: Any) -> LayerEntry:
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: it is no such entry.
        """
        n, k = entry["shape"]
        dtype, activation = _DTYPES[entry["dtype"]], entry["activation"]
        if type(n) is not int or type(k) is not int or min(n, k) < 1:
            raise ValueError(f"shape {entry['shape']}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}")
        pattern = parse_pattern(entry["pattern"])
        filters = _filters(entry["filters"]) if "filters" in entry else None
        if filters is not None and filters.matrix_shape(pattern) != (n, k):
            raise ValueError(f"filters {entry['filters']} of a matrix {[n, k]}")
        coding = Coding.from_json(entry["coding"]) if "coding" in entry else None
        return cls(pattern, (n, k), dtype, activation, filters, coding)

    @classmethod
    def of(cls, packed: PackedWeight, activation: str | None = None) -> LayerEntry:
        """The entry of a packed weight."""
        meta = packed.meta
        return cls(meta.pattern, meta.shape, meta.dtype, activation, meta.filters)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return self.shape if self.filters is None else self.filters.weight_shape

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that hold the weight."""
        if self.coding is not None:
            return CODED_PARTS
        return CANONICAL_PARTS if self.pattern.family == "bsr" else CANONICAL_PARTS[:2]


def _filters(entry: Any) -> FilterShape:
    rows, channels, *kernel = entry["weight"]
    if len(kernel) not in (1, 2):
        raise ValueError(f"filters {entry['weight']}")
    height, width = kernel if len(kernel) == 2 else (1, *kernel)
    return FilterShape(rows, channels, (height, width), entry["groups"], len(kernel))


@dataclass(frozen=True)
class FileSummary:
    """What is in a file; `str()` is a table.

    Attributes:
        path: the file.
        version: of the file format.
        nbytes: size of the file.
        layers: the sparse layers.
        layer_bytes: bytes each sparse layer takes in the file, bias not included.
        dense: (dtype, shape) of every other tensor.
        fused: activation modules that a layer applies itself.
        folded: batch normalisations that weights and biases hold.
        tied: names that share another name's tensor.
    """

    path: str
    version: int
    nbytes: int
    layers: dict[str, LayerEntry]
    layer_bytes: dict[str, int]
    dense: dict[str, tuple[str, tuple[int, ...]]]
    fused: dict[str, str]
    folded: list[str]
    tied: dict[str, str]

    def __str__(self) -> str:
        coded = any(entry.coding for entry in self.layers.values())
        rows = []
        for name, entry in self.layers.items():
            shape = entry.weight_shape
            kept = self.layer_bytes[name] / (math.prod(shape) * entry.dtype.itemsize)
            row = [
                name,
                str(entry.pattern),
                " x ".join(map(str, shape)),
                str(entry.dtype).removeprefix("torch."),
                entry.activation or "-",
                f"{self.layer_bytes[name]:,}",
                f"{kept:.1%}",
            ]
            rows.append([*row, str(entry.coding or "-")] if coded else row)
        head = ["sparse layer", "pattern", "weight", "dtype", "activation", "bytes", "of dense"]
        head += ["compression"] * coded
        lines = [
            f"{self.path}: sparsekit file, version {self.version}, {self.nbytes:,} bytes",
            table(head, rows) if rows else "no sparse layers",
            f"{len(self.dense)} dense tensors, {len(self.tied)} tied names, "
            f"{len(self.fused)} fused activations, {len(self.folded)} folded batch normalisations",
        ]
        return "\n".join(lines)
