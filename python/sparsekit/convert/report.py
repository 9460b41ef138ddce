"""What `convert` did with each layer, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from sparsekit.dispatch import table


@dataclass(frozen=True)
class ConvertRow:
    """What happened to one layer.

    Attributes:
        layer: dotted name.
        pattern: spelling of the pattern, or None when there is none.
        kernel: the sparse kernel for the largest m seen, or None.
        dense_ms: time of the fastest dense path for all calls of one forward pass, in
            milliseconds; None when it was not measured.
        sparse_ms: the same for the sparse kernel.
        speedup: dense time / sparse time.
        verdict: "sparse" or "dense".
        reason: why.
        activation: the activation fused into the layer, or None.
        m: rows of x, or output pixels of a convolution, in each call of the layer.
        batchnorm: whether the batch normalisation after the layer was folded into it.
        residual: whether the layer adds the shortcut of its block, before the activation.
        inputs: of a convolution: shape and memory format of x in each call, e.g.
            "1x64x56x56 NHWC"; as a 2-D convolution sees it once the others are sparse, a 1-D one
            while the others are dense. Padded where the padding mode is not zeros.
        nchw_ms: of a convolution whose x comes as NCHW: how much of `sparse_ms` goes into
            converting it, measured by itself; None when it was not measured.
    """

    layer: str
    pattern: str | None
    kernel: str | None
    dense_ms: float | None
    sparse_ms: float | None
    speedup: float | None
    verdict: Literal["sparse", "dense"]
    reason: str
    activation: str | None = None
    m: tuple[int, ...] = ()
    batchnorm: bool = False
    residual: bool = False
    inputs: tuple[str, ...] = ()
    nchw_ms: float | None = None


@dataclass(frozen=True)
class ConvertReport:
    """One row per layer looked at; `str()` is a table."""

    rows: list[ConvertRow]

    @property
    def sparse(self) -> list[str]:
        """Names of the layers that are sparse now."""
        return [row.layer for row in self.rows if row.verdict == "sparse"]

    def to_json(self) -> str:
        """The rows as a JSON array."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        head = ("layer", "pattern", "kernel", "dense ms", "sparse ms", "speed", "verdict", "reason")
        rows = [
            (
                row.layer,
                row.pattern or "-",
                row.kernel or "-",
                _figure(row.dense_ms, ".3f"),
                _figure(row.sparse_ms, ".3f"),
                _figure(row.speedup, ".2f") + ("" if row.speedup is None else "x"),
                " + ".join(_parts(row)),
                row.reason,
            )
            for row in self.rows
        ]
        total = f"{len(self.sparse)} of {len(self.rows)} layers are sparse"
        return f"{table(head, rows)}\n{total}"


def _parts(row: ConvertRow) -> list[str]:
    parts: list[str] = [row.verdict]
    if row.batchnorm:
        parts.append("batchnorm")
    if row.residual:
        parts.append("residual")
    if row.activation:
        parts.append(row.activation)
    return parts


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
