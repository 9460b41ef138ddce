"""`plan_latency`: which pattern each layer gets, so that a model meets a time or a size.

What AMC (He et al. 2018, arXiv 1802.03494) looks for by reinforcement learning and NetAdapt (Yang
et al. 2018, arXiv 1804.03230) step by step, is solved here from two tables: the time of each layer
with each pattern, measured on this device, and what the model loses when that layer alone has that
pattern. One pattern for each layer, the sum of the times within the budget, the sum of the losses
the least there is: a small integer programme.

It takes losses as if they added up, which they do roughly while each is small; and layer times
too, which they do as long as a model spends its time in its layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from sparsekit.clock import clock, warm_up
from sparsekit.convert.times import LayerTime, time_layers
from sparsekit.examples import run_examples
from sparsekit.patterns import Pattern, PatternLike, exactly, parse_pattern
from sparsekit.prune.allocation.scan import Evaluate, SensitivityReport
from sparsekit.prune.allocation.sensitivity import sensitivity
from sparsekit.prune.calibration import Loss
from sparsekit.prune.report import as_text
from sparsekit.prune.targets import choose_layers

CANDIDATES = ("2:4", "2:4v4", "1:4", "bsr16x16@0.5", "bsr16x16@0.75")

_MODEL_BUDGET_S = 1.0
_MIN_RUNS, _MAX_RUNS = 5, 51


@dataclass(frozen=True)
class LayerOption:
    """One way to run a layer.

    Attributes:
        pattern: None is dense.
        ms: of all its calls in one pass over the examples; where the pattern loses to dense, the
            dense time, because `convert` leaves such a layer dense.
        nbytes: of its weight, packed for this device.
        loss: of the model, with this layer alone pruned.
        kernel: what runs; "" for dense.
    """

    pattern: Pattern | None
    ms: float
    nbytes: int
    loss: float = 0.0
    kernel: str = ""


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, every way to run it, and the one that was chosen.

    Attributes:
        name: dotted.
        options: dense comes first.
        chosen: index of the chosen one.
    """

    name: str
    options: tuple[LayerOption, ...]
    chosen: int = 0

    @property
    def choice(self) -> LayerOption:
        """The chosen one."""
        return self.options[self.chosen]

    @property
    def dense(self) -> LayerOption:
        """The dense one."""
        return self.options[0]


@dataclass(frozen=True, eq=False)
class LatencyPlan(Mapping[str, "Pattern | None"]):
    """A pattern for each layer: a mapping that `prune` and `convert` take as it is.

    Its keys are the layers' names, with what a glob would read otherwise escaped. Print it to see
    a table.

    Attributes:
        layers: those that had a choice, in the model's order.
        dense_model_ms: measured time of the dense model for one pass over the examples.
        budget_ms: most time of the model, or None.
        budget_bytes: most bytes of the layers' weights, or None.
        left_dense: layer name -> why it had no choice.
    """

    layers: tuple[PlannedLayer, ...]
    dense_model_ms: float
    budget_ms: float | None = None
    budget_bytes: int | None = None
    left_dense: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _patterns(self) -> dict[str, Pattern | None]:
        return {exactly(layer.name): layer.choice.pattern for layer in self.layers}

    def __getitem__(self, expression: str) -> Pattern | None:
        return self._patterns[expression]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    @property
    def dense_ms(self) -> float:
        """Time of the layers when they are all dense."""
        return sum(layer.dense.ms for layer in self.layers)

    @property
    def layers_ms(self) -> float:
        """Predicted time of the layers."""
        return sum(layer.choice.ms for layer in self.layers)

    @property
    def model_ms(self) -> float:
        """Predicted time of the model: the dense model's, less what the layers save.

        They are compared with the fastest dense path there is; a model that runs on a slower one
        gains more than predicted.
        """
        return self.dense_model_ms - self.dense_ms + self.layers_ms

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' weights."""
        return sum(layer.choice.nbytes for layer in self.layers)

    @property
    def loss(self) -> float:
        """Predicted loss of the model: the sum of the layers'."""
        return sum(layer.choice.loss for layer in self.layers)

    def solve(self, budget_ms: float | None = None, budget_bytes: int | None = None) -> LatencyPlan:
        """The plan of least loss for another budget, from the same measurements.

        Raises:
            ValueError: the budget cannot be met; says what can.
        """
        # The rest of the model takes the same time whatever is chosen.
        rest = self.dense_model_ms - self.dense_ms
        limits = []
        if budget_ms is not None:
            times = [[option.ms for option in layer.options] for layer in self.layers]
            least = rest + sum(map(min, times))
            if least > budget_ms:
                raise ValueError(
                    f"plan_latency: the model cannot take at most {budget_ms:.4g} ms; with these "
                    f"candidates it reaches {least:.4g} ms, {least / self.dense_model_ms:.1%} of "
                    f"dense ({self.dense_model_ms:.4g} ms). Raise the budget, or add candidates"
                )
            limits.append((times, budget_ms - rest))
        if budget_bytes is not None:
            sizes = [[float(option.nbytes) for option in layer.options] for layer in self.layers]
            smallest = sum(map(min, sizes))
            if smallest > budget_bytes:
                raise ValueError(
                    f"plan_latency: the weights cannot take at most {budget_bytes} bytes; with "
                    f"these candidates they reach {smallest:.0f}. Raise the budget, or add "
                    "candidates"
                )
            limits.append((sizes, float(budget_bytes)))
        losses = [[option.loss for option in layer.options] for layer in self.layers]
        chosen = least_loss(losses, limits)
        layers = [
            replace(layer, chosen=index) for layer, index in zip(self.layers, chosen, strict=True)
        ]
        return replace(self, layers=tuple(layers), budget_ms=budget_ms, budget_bytes=budget_bytes)

    def frontier(self, points: int = 10) -> list[LatencyPlan]:
        """Plans from the fastest to the dense model, in steps of equal time; no two are alike.

        Where the plan has a budget of bytes alone, in steps of equal size.
        """
        if points < 2:
            raise ValueError(f"plan_latency: a frontier has at least 2 points, got {points}")
        by_size = self.budget_ms is None and self.budget_bytes is not None
        if by_size:
            low = float(sum(min(o.nbytes for o in layer.options) for layer in self.layers))
            high = float(sum(layer.dense.nbytes for layer in self.layers))
        else:
            low = self.dense_model_ms - sum(
                layer.dense.ms - min(o.ms for o in layer.options) for layer in self.layers
            )
            high = self.dense_model_ms
        plans: list[LatencyPlan] = []
        for point in range(points):
            budget = low + (high - low) * point / (points - 1)
            # Not below what is reachable by an error of rounding.
            budget *= 1 + 1e-9
            if by_size:
                plan = self.solve(budget_bytes=int(budget))
            else:
                plan = self.solve(budget, self.budget_bytes)
            if not plans or dict(plan) != dict(plans[-1]):
                plans.append(plan)
        return plans

    def __rich__(self) -> RenderableType:
        table = Table()
        table.add_column("layer", overflow="fold")
        table.add_column("choice")
        for heading in ("dense ms", "chosen ms", "loss"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name,
                str(layer.choice.pattern or "dense"),
                f"{layer.dense.ms:.3f}",
                f"{layer.choice.ms:.3f}",
                f"{layer.choice.loss:.4g}" if layer.chosen else "",
            )
        share = self.model_ms / self.dense_model_ms
        lines = [
            f"layers {self.dense_ms:.3f} ms dense, {self.layers_ms:.3f} ms chosen; "
            f"their weights {sum(layer.dense.nbytes for layer in self.layers)} bytes dense, "
            f"{self.nbytes} chosen",
            f"model {self.dense_model_ms:.3f} ms dense, {self.model_ms:.3f} ms predicted "
            f"({share:.1%}); loss {self.loss:.4g}, if losses add up",
        ]
        if self.left_dense:
            lines.append(f"{len(self.left_dense)} more layers stay dense (left_dense says why)")
        return Group(table, *lines)

    def __str__(self) -> str:
        return as_text(self)


def plan_latency(
    model: nn.Module,
    example_inputs: Any,
    candidates: Sequence[PatternLike] = CANDIDATES,
    *,
    budget_ms: float | None = None,
    budget_ratio: float | None = None,
    budget_bytes: int | None = None,
    losses: SensitivityReport | None = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    loss: Loss | None = None,
    method: str = "magnitude",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    fuse: bool = True,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LatencyPlan:
    """Choose a pattern for each layer, or none, so that a budget is met at the least loss.

    Times are measured on the device of the model as `convert(gate="measure")` does, over all calls
    that the examples show, and share its cache; a pattern that loses to dense is not offered,
    unless there is a budget of bytes. Losses are measured for the layers and patterns that win.
    Give `prune` and `convert` the plan, `convert` the same examples and `fuse`. Needs scipy.

    Args:
        model: is afterwards what it was.
        example_inputs: as for `convert`; the time is that of one pass over all of them.
        candidates: the patterns to choose from; dense is always one more.
        budget_ms: most time that the model may take, in milliseconds.
        budget_ratio: the same as a share of the dense model's time.
        budget_bytes: most bytes of the weights of the layers that have a choice, packed as
            `convert(gate="always")` does.
        losses: a report of `sparsekit.prune.sensitivity` on this model with these candidates;
            None makes one.
        calibration: for that, as for `sensitivity`.
        evaluate: for that.
        loss: for that.
        method: for that.
        targets: which layers, by globs or `re:` expressions; None means all.
        ignore: layers left alone; wins over `targets`.
        fuse: as for `convert`.
        cache: file of the verdicts; None for the usual one.
        progress: show progress bars.

    Raises:
        ValueError: no budget or two of the same kind, one that cannot be met (says what can),
            losses that are missing and nothing to measure them by.
        ImportError: scipy is not installed.
    """
    _check_budget(budget_ms, budget_ratio, budget_bytes)
    if losses is None and calibration is None and evaluate is None:
        raise ValueError(
            "plan_latency: nothing says what a pruned layer costs; pass losses= from "
            "sparsekit.prune.sensitivity, or calibration= or evaluate= to measure it"
        )
    _milp()  # before minutes of measuring
    patterns = list(dict.fromkeys(map(parse_pattern, candidates)))
    if not patterns:
        raise ValueError("plan_latency: no candidates; pass at least one, such as '2:4'")
    prunable: dict[str, set[Pattern]] = {}
    reasons: dict[str, str] = {}
    for pattern in patterns:
        chosen, dense = choose_layers(model, pattern, targets, ignore)
        for name in chosen:
            prunable.setdefault(name, set()).add(pattern)
        reasons.update((name, reason) for name, (_, reason) in dense.items())
    names = [exactly(name) for name in prunable]
    times, untimed = time_layers(
        model, patterns, example_inputs, names, ignore, fuse, cache, progress
    )
    reasons = {name: why for name, why in (reasons | untimed).items() if name not in times}
    offered = {
        name: {
            pattern: time
            for pattern, time in mine.items()
            if pattern in prunable[name] and (budget_bytes is not None or not time.judged.lost)
        }
        for name, mine in times.items()
    }
    used = [pattern for pattern in patterns if any(pattern in mine for mine in offered.values())]
    if losses is None and used:
        names = [exactly(name) for name, mine in offered.items() if mine]
        losses = sensitivity(
            model,
            used,
            calibration,
            evaluate=evaluate,
            method=method,
            targets=names,
            loss=loss,
            progress=progress,
        )
    layers = []
    for name, mine in times.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        dense_ms = median(time.judged.dense_ms or 0.0 for time in mine.values())
        options = [LayerOption(None, dense_ms, weight.nbytes)]
        for pattern, time in offered[name].items():
            assert losses is not None
            if name in losses.skipped:
                continue
            options.append(_option(pattern, time, dense_ms, losses.loss(name, pattern)))
        layers.append(PlannedLayer(name, tuple(options)))
    plan = LatencyPlan(tuple(layers), _model_ms(model, example_inputs), left_dense=reasons)
    if plan.dense_ms > plan.dense_model_ms:
        warnings.warn(
            f"plan_latency: the dense layers take {plan.dense_ms:.4g} ms, the whole model "
            f"{plan.dense_model_ms:.4g} ms, so the machine was busier for one than for the other; "
            "predicted times are off. Measure anew: pass another cache=",
            UserWarning,
            stacklevel=2,
        )
    if budget_ratio is not None:
        budget_ms = budget_ratio * plan.dense_model_ms
    return plan.solve(budget_ms, budget_bytes)


def _option(pattern: Pattern, time: LayerTime, dense_ms: float, loss: float) -> LayerOption:
    judged = time.judged
    assert judged.speedup is not None
    # Dense and sparse were timed in turns, so their ratio is steadier than either.
    ms = dense_ms if judged.lost else dense_ms / judged.speedup
    return LayerOption(pattern, ms, time.nbytes, loss, judged.kernel)


def least_loss(
    losses: Sequence[Sequence[float]],
    limits: Sequence[tuple[Sequence[Sequence[float]], float]],
) -> list[int]:
    """One option for each row so that the sum of the losses is the least that the limits allow.

    Args:
        losses: rows of options, of any number each.
        limits: (what each option costs, most that the chosen ones may cost together).

    Returns:
        The index of each row's option.

    Raises:
        ValueError: no options meet all limits.
        ImportError: scipy is not installed.
        RuntimeError: the solver failed.
    """
    if not losses:
        return []
    optimize = _milp()
    flat = [loss for row in losses for loss in row]
    # The solver's tolerances are absolute: everything is brought to the order of 1.
    scale = max(map(abs, flat)) or 1.0
    one_each = np.repeat(np.eye(len(losses)), [len(row) for row in losses], axis=1)
    constraints = [optimize.LinearConstraint(one_each, 1.0, 1.0)]
    for costs, most in limits:
        unit = sum(map(max, costs)) or 1.0
        scaled = [cost / unit for row in costs for cost in row]
        constraints.append(optimize.LinearConstraint([scaled], ub=most / unit))
    found = optimize.milp(
        [loss / scale for loss in flat],
        constraints=constraints,
        integrality=[1] * len(flat),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2:
        raise ValueError("plan_latency: no choice meets both budgets; raise one of them")
    if found.x is None:
        raise RuntimeError(f"plan_latency: the solver failed: {found.message}")
    chosen, start = [], 0
    for row in losses:
        part = list(found.x[start : start + len(row)])
        chosen.append(part.index(max(part)))
        start += len(row)
    return chosen


def _milp() -> Any:
    try:
        from scipy import optimize
    except ImportError:
        raise ImportError(
            "plan_latency: needs scipy, which this Python does not have; run "
            'pip install "sparsekit-kernels[prune]"'
        ) from None
    return optimize


def _check_budget(ms: float | None, ratio: float | None, nbytes: int | None) -> None:
    if ms is None and ratio is None and nbytes is None:
        raise ValueError(
            "plan_latency: no budget; pass budget_ms=, budget_ratio= (share of the dense model's "
            "time) or budget_bytes="
        )
    if ms is not None and ratio is not None:
        raise ValueError("plan_latency: pass budget_ms= or budget_ratio=, not both")
    for name, value in (("budget_ms", ms), ("budget_ratio", ratio), ("budget_bytes", nbytes)):
        if value is not None and not value > 0:
            raise ValueError(f"plan_latency: {name} must be greater than 0, got {value}")


def _model_ms(model: nn.Module, example_inputs: Any) -> float:
    """Median time of one pass over the examples."""
    device = next(model.parameters()).device
    nothing = torch.empty(0)

    def call() -> torch.Tensor:
        run_examples(model, example_inputs)
        return nothing

    seconds = clock(device)
    warm_up(call, device)
    runs: list[float] = []
    while len(runs) < _MIN_RUNS or (len(runs) < _MAX_RUNS and sum(runs) < _MODEL_BUDGET_S):
        runs.append(seconds(call))
    return median(runs) * 1e3
