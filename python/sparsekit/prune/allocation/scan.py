"""The scan: what the model loses by one pruned layer, each layer and each pattern by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.patterns import Pattern, PatternLike, parse_pattern
from sparsekit.prune.calibration import Batch, Calibration
from sparsekit.prune.layers import Layer
from sparsekit.prune.layerwise import PruneLayer
from sparsekit.prune.modes import eval_mode
from sparsekit.prune.recovery.distill import LOSSES, main_output, without_padding
from sparsekit.prune.report import as_text

Evaluate: TypeAlias = Callable[[nn.Module], float]
"""The model -> how good it is, higher = better."""

SCAN_BATCHES = 8
"""Batches of the calibration that outputs are compared on."""


@dataclass(frozen=True)
class SensitivityRow:
    """One layer pruned alone.

    Attributes:
        layer: dotted module name.
        pattern: the pattern's spelling.
        sparsity: fraction of zeros in its weight then.
        loss: what the model loses, in the report's `measure`; 0 = nothing, below 0 it gained.
    """

    layer: str
    pattern: str
    sparsity: float
    loss: float


@dataclass(frozen=True)
class SensitivityReport:
    """Result of `sensitivity`. `print(report)` shows a table, the most fragile layer first.

    Attributes:
        method: name of the pruning method.
        measure: what the losses are: a name in `LOSSES` (distance of the output from the dense
            model's), "loss" (rise of the caller's loss) or "evaluate" (fall of the caller's score).
        rows: one for each layer and pattern, layers in the order they were done.
        dense: the dense model's loss or score; None where outputs are compared.
        skipped: layer name -> why it was not tried.
    """

    method: str
    measure: str
    rows: tuple[SensitivityRow, ...]
    dense: float | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, the most fragile first: by the loss under their worst pattern."""
        worst: dict[str, float] = {}
        for row in self.rows:
            worst[row.layer] = max(row.loss, worst.get(row.layer, row.loss))
        return sorted(worst, key=lambda name: -worst[name])

    def of(self, layer: str) -> dict[Pattern, float]:
        """The losses of one layer, by pattern."""
        return {parse_pattern(row.pattern): row.loss for row in self.rows if row.layer == layer}

    def loss(self, layer: str, pattern: PatternLike) -> float:
        """The loss of one layer under one pattern.

        Raises:
            ValueError: it was not measured.
        """
        wanted, known = parse_pattern(pattern), self.of(layer)
        if wanted not in known:
            there = ", ".join(map(str, known)) or "nothing"
            raise ValueError(
                f"sensitivity: layer {layer!r} was not measured with {wanted}, but with {there}; "
                "scan it with this pattern as well"
            )
        return known[wanted]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {
            "method": self.method,
            "measure": self.measure,
            "dense": self.dense,
            "rows": [vars(row).copy() for row in self.rows],
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SensitivityReport:
        """The report that `to_dict` wrote.

        Raises:
            ValueError: something is missing or has another name.
        """
        try:
            rows = tuple(SensitivityRow(**row) for row in values["rows"])
            return cls(
                values["method"], values["measure"], rows, values["dense"], values["skipped"]
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"sensitivity: expected what SensitivityReport.to_dict gave, but {error}"
            ) from None

    def plot(self, path: str | Path) -> None:
        """Draw the losses, one group of bars per layer in the order they were done.

        Args:
            path: file to write; its ending chooses the format, ".png" or ".svg" for instance.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "sensitivity: plot needs matplotlib, which this Python does not have; "
                'run pip install "sparsekit-kernels[demo]"'
            ) from None
        names = list(dict.fromkeys(row.layer for row in self.rows))
        spellings = list(dict.fromkeys(row.pattern for row in self.rows))
        figure = Figure(figsize=(max(6.0, 0.3 * len(names) * len(spellings)), 5.0))
        axes = figure.subplots()
        width = 0.8 / max(1, len(spellings))
        for index, spelling in enumerate(spellings):
            mine = {row.layer: row.loss for row in self.rows if row.pattern == spelling}
            places = [place + index * width for place, name in enumerate(names) if name in mine]
            axes.bar(places, [mine[name] for name in names if name in mine], width, label=spelling)
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))])
        axes.set_xticklabels(names, rotation=90, fontsize=7)
        axes.set_ylabel(f"loss of the model ({self.measure})")
        axes.set_title(f"one layer pruned at a time ({self.method})")
        axes.legend()
        figure.savefig(path, bbox_inches="tight")

    def __rich__(self) -> RenderableType:
        table = Table()
        table.add_column("layer", overflow="fold")
        spellings = list(dict.fromkeys(row.pattern for row in self.rows))
        for spelling in spellings:
            table.add_column(spelling, justify="right")
        losses = {(row.layer, row.pattern): f"{row.loss:.4g}" for row in self.rows}
        for name in self.layers:
            cells = [losses.get((name, spelling), "") for spelling in spellings]
            table.add_row(name or "(model)", *cells)
        summary = f"loss of the model with one layer pruned ({self.method}, {self.measure})"
        if self.dense is not None:
            summary += f"; dense {self.dense:.4g}"
        skipped = [f"{name or '(model)'}: not tried, {why}" for name, why in self.skipped.items()]
        return Group(summary, table, *skipped)

    def __str__(self) -> str:
        return as_text(self)


class Measure:
    """How much worse a model is than when this was made.

    Args:
        evaluate: the caller's score, or None.
        outputs: what the model makes of the batches, in their order.
        batches: the same batches; with a loss they give that loss.
        distance: name in `LOSSES`, for batches without a loss.
    """

    def __init__(
        self,
        evaluate: Callable[[], float] | None,
        outputs: Callable[[], Iterable[Any]],
        batches: Sequence[Batch],
        distance: str,
    ) -> None:
        self._evaluate = evaluate
        self._outputs = outputs
        self._batches = batches
        self._distance = LOSSES[distance]
        self.dense: float | None = None
        if evaluate is not None:
            self.name, self.dense = "evaluate", float(evaluate())
        elif batches[0].loss is not None:
            self.name, self.dense = "loss", self._mean_loss()
        else:
            self.name = distance
            self._expected = [_tensor(output).clone() for output in outputs()]

    def __call__(self) -> float:
        if self._evaluate is not None:
            assert self.dense is not None
            return self.dense - float(self._evaluate())
        if self.dense is not None:
            return self._mean_loss() - self.dense
        distances = [
            float(self._distance(*without_padding(_tensor(output), expected, batch)))
            for output, expected, batch in zip(
                self._outputs(), self._expected, self._batches, strict=True
            )
        ]
        return sum(distances) / len(distances)

    def _mean_loss(self) -> float:
        losses = [float(output) for output in self._outputs()]
        return sum(losses) / len(losses)


def scan(
    model: nn.Module,
    todo: Mapping[str, tuple[Layer, Sequence[Pattern]]],
    prune_layer: PruneLayer,
    method: str,
    batches: Sequence[Batch] | None,
    evaluate: Evaluate | None,
    needs_moments: bool,
    distance: str,
    scan_batches: int,
    cache_bytes: int,
    pixels: int,
    progress: bool,
) -> SensitivityReport:
    """Prune each layer alone with each of its patterns, and put its weight back.

    The statistics of a layer's inputs are collected once, from the dense model. Where outputs are
    compared, blocks before the layer that is being tried are played back from the calibration's
    cache: on average that halves the work.
    """
    rows: list[SensitivityRow] = []
    reached: set[str] = set()
    total = sum(len(patterns) for _, patterns in todo.values())
    bar = tqdm(total=total, desc=f"sensitivity ({method})", disable=not progress)

    def attempt(layer: Layer, moments: Tensor | None, measure: Measure) -> None:
        reached.add(layer.name)
        for pattern in todo[layer.name][1]:
            bar.set_postfix_str(f"{layer.name} {pattern}", refresh=False)
            with _kept(layer.weight):
                prune_layer(layer, pattern, moments)
                zeros = float((layer.weight == 0).float().mean())
                rows.append(SensitivityRow(layer.name, str(pattern), zeros, measure()))
            bar.update()

    layers = [layer for layer, _ in todo.values()]
    score = None if evaluate is None else lambda: evaluate(model)
    with bar, torch.no_grad(), eval_mode(model):
        if batches is None or (score is not None and not needs_moments):
            measure = Measure(score, tuple, (), distance)
            for layer in layers:
                attempt(layer, None, measure)
        else:
            compared = batches[:scan_batches]
            # The caller's own data must go through the model itself, not through kept outputs.
            cache = 0 if score is not None else cache_bytes
            with Calibration(model, batches, layers, cache, pixels) as calibration:
                measure = Measure(
                    score, lambda: calibration.outputs(len(compared)), compared, distance
                )
                for group in calibration.groups:
                    moments = calibration.moments(group)
                    for layer in group.layers:
                        attempt(layer, moments, measure)
                    calibration.done(group)
    unreached = {name: "no calibration batch runs it" for name in todo if name not in reached}
    return SensitivityReport(method, measure.name, tuple(rows), measure.dense, unreached)


@contextmanager
def _kept(weight: Tensor) -> Iterator[None]:
    """Puts the weight back, bit for bit."""
    before = weight.clone()
    try:
        yield
    finally:
        weight.copy_(before)


def _tensor(returned: Any) -> Tensor:
    found = main_output(returned)
    if found is None:
        raise ValueError(
            f"sensitivity: the model returns a {type(returned).__name__}, in which no tensor can "
            "be compared; pass evaluate= or loss="
        )
    return found
