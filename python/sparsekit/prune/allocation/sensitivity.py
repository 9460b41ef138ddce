"""`sensitivity`: which layers of a model bear which pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparsekit.patterns import Pattern, PatternLike, parse_pattern
from sparsekit.prune.allocation.scan import SCAN_BATCHES, Evaluate, SensitivityReport, scan
from sparsekit.prune.calibration import CACHE_BYTES, Loss, read_batches
from sparsekit.prune.layers import Layer
from sparsekit.prune.layerwise import check_weight, choose_method, layer_pruner
from sparsekit.prune.patches import PIXELS
from sparsekit.prune.reconstruct import ReconstructionOptions
from sparsekit.prune.recovery.distill import LOSSES
from sparsekit.prune.scores import Unpruned
from sparsekit.prune.targets import choose_layers


def sensitivity(
    model: nn.Module,
    patterns: PatternLike | Sequence[PatternLike],
    calibration: Iterable[Any] | None = None,
    *,
    evaluate: Evaluate | None = None,
    method: str = "magnitude",
    reconstruction: str | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    loss: Loss | None = None,
    distance: str = "relative_mse",
    scan_batches: int = SCAN_BATCHES,
    solver_block: int = 128,
    dampening: float = 0.01,
    cache_bytes: int = CACHE_BYTES,
    pixels: int = PIXELS,
    seed: int = 0,
    progress: bool = True,
) -> SensitivityReport:
    """Prune one layer at a time, and measure what the model loses by it.

    The model is afterwards what it was, bit for bit. What one layer costs says little about what
    all of them cost together, but a lot about which to spare: `allocation=Sensitivity(report)` and
    `plan_latency(losses=report)` read it. Costs as many forward passes over the compared batches
    as there are layers times patterns, of which half are saved in a model of repeated blocks.

    Args:
        model: run in eval mode, by `evaluate` as well; its own modes come back.
        patterns: those to try on every layer.
        calibration: batches as for `prune`: for the method's statistics, and, without `evaluate`,
            to compare outputs on.
        evaluate: the model -> a score, higher = better. The loss of a layer is then how far the
            score falls.
        method: a name in `METHODS`.
        reconstruction: a name in `RECONSTRUCTIONS`; None takes the method's own.
        targets: globs or `re:` expressions of the layers to try; None means all.
        ignore: layers to leave out, wins over `targets`.
        loss: `(model, batch) -> scalar`, as for `prune`. The loss of a layer is then the rise of
            its mean over the batches.
        distance: where there is neither `evaluate` nor `loss`: a name in `LOSSES`, how far the
            model's output is from the dense one's; "kl" suits logits.
        scan_batches: batches that the model is compared on, from the first on.
        solver_block: as for `prune`.
        dampening: as for `prune`.
        cache_bytes: as for `prune`.
        pixels: as for `prune`.
        seed: as for `prune`.
        progress: show a progress bar.

    Raises:
        ValueError: nothing to measure by, an unknown name, or what `prune` refuses.
    """
    if calibration is None and evaluate is None:
        raise ValueError(
            "sensitivity: nothing to measure by; pass evaluate=, which scores the model, or "
            "calibration=batches to compare its outputs on"
        )
    if distance not in LOSSES:
        raise ValueError(
            f"sensitivity: unknown distance {distance!r}; known are {', '.join(sorted(LOSSES))}"
        )
    if scan_batches < 1:
        raise ValueError(f"sensitivity: scan_batches must be at least 1, got {scan_batches}")
    chosen_method, name, solve = choose_method(method, reconstruction, calibration is not None)
    options = ReconstructionOptions(solver_block, dampening)
    given = [patterns] if isinstance(patterns, str | Pattern) else list(patterns)
    if not given:
        raise ValueError("sensitivity: no patterns to try; pass at least one, such as '2:4'")
    batches = None if calibration is None else read_batches(calibration, loss=loss)
    todo: dict[str, tuple[Layer, list[Pattern]]] = {}
    skipped: dict[str, str] = {}
    statistics: dict[Pattern, Mapping[str, Tensor]] = {}
    for pattern in dict.fromkeys(map(parse_pattern, given)):
        chosen, dense = choose_layers(model, pattern, targets, ignore)
        skipped.update({name: reason for name, (_, reason) in dense.items()})
        for layer, _ in chosen.values():
            check_weight(layer)
        statistics[pattern] = {}
        if chosen_method.statistic is not None:
            unpruned = Unpruned(model, chosen, batches or (), seed)
            statistics[pattern] = chosen_method.statistic(unpruned)
            lost = [name for name in chosen if name not in statistics[pattern]]
            skipped.update(dict.fromkeys(lost, "no gradient reaches it"))
            chosen = {name: each for name, each in chosen.items() if name not in lost}
        for name, (layer, _) in chosen.items():
            todo.setdefault(name, (layer, []))[1].append(pattern)
    report = scan(
        model,
        todo,
        layer_pruner(chosen_method, solve, options, statistics.__getitem__),
        method,
        batches,
        evaluate,
        chosen_method.reads_inputs or name != "none",
        distance,
        scan_batches,
        cache_bytes,
        pixels,
        progress,
    )
    skipped = {name: why for name, why in skipped.items() if name not in todo}
    return replace(report, skipped={**skipped, **report.skipped})
