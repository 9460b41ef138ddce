"""`prune`: from a dense model to one whose weights follow a pattern."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.patterns import Pattern, PatternChoice
from sparsekit.prune.allocation.allocate import (
    ALLOCATIONS,
    Allocation,
    DenseModel,
    allocate,
    find_allocation,
)
from sparsekit.prune.calibration import CACHE_BYTES, Calibration, Loss, read_batches
from sparsekit.prune.distributed import (
    DistributedChoice,
    Ranks,
    checksum,
    mean_over_ranks,
    together,
)
from sparsekit.prune.layers import Layer, Prunable
from sparsekit.prune.layerwise import (
    Run,
    check_weight,
    choose_method,
    describe,
    layer_pruner,
    require_groups,
    warn_of_few,
)
from sparsekit.prune.methods import Method
from sparsekit.prune.patches import PIXELS
from sparsekit.prune.reconstruct import ReconstructionOptions
from sparsekit.prune.report import PruneReport
from sparsekit.prune.scores import Unpruned
from sparsekit.prune.targets import choose_layers


@torch.no_grad()
@together
def prune(
    model: nn.Module,
    pattern: PatternChoice,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    progress: bool = True,
    reconstruction: str | None = None,
    solver_block: int = 128,
    dampening: float = 0.01,
    cache_bytes: int = CACHE_BYTES,
    pixels: int = PIXELS,
    loss: Loss | None = None,
    seed: int = 0,
    allocation: str | Allocation = "uniform",
    *,
    distributed: DistributedChoice = None,
) -> PruneReport:
    """Prune the linear layers and convolutions of a model in place.

    A convolution is pruned along its input channels, within each tap of its filters. Depthwise
    convolutions stay dense; so do, unless `targets` names them, those that read fewer than 8
    channels, which is where images enter.

    With calibration the layers are done in the order they run: the batches go through the model
    up to the next layers that share an input, these are pruned, and the layers after them see
    what the pruned ones put out. One second moment `[k, k]` is in memory at a time, where k of a
    convolution is its kernel size times its input channels.

    Args:
        model: changed in place: pruned weights become exactly zero, and a reconstruction changes
            the kept ones. Everything else stays as it is.
        pattern: one pattern for all layers, or a mapping from globs and `re:` expressions on
            module names to patterns (None leaves a layer dense).
        method: a name in `METHODS`, where each is described by its score and its statistic.
        calibration: iterable of batches that the model is called with: a tensor, a tuple or list
            of positional arguments, or a mapping of keyword arguments. Read once, so a generator
            will do. Tokens that a batch's 2-D `attention_mask` leaves out are not counted. With
            it, the report holds each layer's error for methods that do not need it as well.
        targets: globs or `re:` expressions of the layers to prune; None means every `nn.Linear`,
            `nn.Conv1d` and `nn.Conv2d`.
        ignore: layers to leave dense, wins over `targets`.
        progress: show a progress bar.
        reconstruction: what happens to the kept weights, a name in `RECONSTRUCTIONS`: "none",
            "sweep" (SparseGPT's update) or "least_squares"; None takes the method's own.
        solver_block: SparseGPT's column batch.
        dampening: fraction of the mean diagonal added to the second moment's diagonal.
        cache_bytes: most memory for outputs of finished blocks, which spares recomputing them.
        pixels: most output pixels of a convolution that count in one batch; of more, this many are
            drawn evenly, the same ones every time.
        loss: `(model, batch) -> scalar`, called with each batch as `calibration` gave it. With it,
            batches may be anything, pairs of inputs and labels for instance, and the model is run
            by it alone. Methods that need gradients take them from it, or else from the `.loss`
            in the model's own output.
        seed: of the method "random"; the others draw nothing.
        allocation: how the density of a pattern is spread over the layers that have it, a name in
            `ALLOCATIONS` or one of its functions with options, `OWL(spread=0.1)` for instance.
            All layers of a pattern together keep as much as with "uniform". A layer that gets to
            keep everything stays dense.
        distributed: several processes calibrate together, each on batches of its own (one may have
            none), and end with equal masks and weights: True for the default process group of
            `torch.distributed`, or a `ProcessGroup`. Every process calls this with the same model
            and settings; when one fails, all raise. A scan that `allocation` makes counts as the
            first process finds it.

    Returns:
        What was done to each layer, with the masks.

    Raises:
        ValueError: unknown method, reconstruction or allocation, a pattern that leaves an
            allocation nothing to spread, a number of pixels below 1, calibration missing
            where it is needed, empty, exhausted or not made of batches, no layer to prune
            or none that calibration or a gradient reaches, a loss that is missing or is no finite
            scalar, a weight that is empty, a weight or gradient that holds NaN or infinities: the
            model is as before. Inputs of a layer that hold NaN or infinities, or cannot be
            inverted: the layers before it are pruned already. With `distributed`, a process group
            that is not there, or other weights or settings in another process.
        RuntimeError: another process failed by something else than a ValueError.

    Warns:
        UserWarning: a layer saw fewer tokens or patches than it has columns, and the method or
            the reconstruction reads how columns go together.
    """
    ranks = Ranks.of(distributed)
    started = time.perf_counter()
    chosen_method, name, solve = choose_method(method, reconstruction, calibration is not None)
    spread = find_allocation(allocation)
    if pixels < 1:
        raise ValueError(f"prune: pixels must be at least 1, got {pixels}")
    options = ReconstructionOptions(solver_block, dampening)
    batches = None
    if calibration is not None:
        batches = read_batches(calibration, loss=loss, may_be_empty=ranks.several)
    chosen, dense = choose_layers(model, pattern, targets, ignore)
    for layer, _ in chosen.values():
        check_weight(layer)
    settings = {
        "settings": (method, name, options, pixels, batches is None, loss is None, seed),
        "allocation": getattr(spread, "__name__", repr(spread)),
    }
    _require_agreement(ranks, settings, chosen)

    over_layers = spread is ALLOCATIONS["global"]
    unpruned = Unpruned(model, chosen, batches or (), seed, over_layers)
    statistics = _statistics(chosen_method, unpruned, batches is not None, ranks)
    if chosen_method.statistic is not None:
        chosen = _reached(chosen, statistics, dense)
    before = DenseModel(
        model,
        batches,
        method,
        chosen_method,
        options,
        layer_pruner(chosen_method, solve, options, lambda _: statistics),
        statistics,
        cache_bytes,
        pixels,
        progress,
        ranks,
    )
    patterns: dict[str, Pattern] = {}
    for layer_name, wanted in ranks.exchange(allocate(before, chosen, spread))[0].items():
        if wanted is None:
            dense[layer_name] = (chosen[layer_name][0].modules[0], "its allocation keeps all of it")
        else:
            patterns[layer_name] = wanted

    layers = [chosen[layer_name][0] for layer_name in patterns]
    run = Run(patterns, chosen_method.score, solve, options, statistics)
    with tqdm(total=len(layers), desc=f"prune ({method})", disable=not progress) as bar:

        def apply(group: Iterable[Layer], moments: Tensor | None) -> None:
            for layer in group:
                bar.set_postfix_str(layer.name, refresh=False)
                run.prune(layer, moments)
                # Solvers round in their own way on each kind of processor.
                ranks.share([layer.weight, run.masks[layer.name]])
                bar.update()

        if batches is None:
            apply(layers, None)
        else:
            tokens: dict[str, int] = {}
            calibrated = Calibration(model, batches, layers, cache_bytes, pixels, ranks)
            for layer in _calibrated(calibrated, apply, tokens):
                dense[layer.name] = (layer.modules[0], "no calibration batch runs it")
            if chosen_method.correlations or name != "none":
                warn_of_few(tokens, layers, stacklevel=5)  # beyond both decorators
    left = [
        describe(layer_name, module.weight, None, reason=reason)
        for layer_name, (module, reason) in dense.items()
    ]
    seconds = time.perf_counter() - started
    return PruneReport(method, name, (*run.done, *left), run.masks, seconds)


def _require_agreement(
    ranks: Ranks, settings: Mapping[str, Any], chosen: Mapping[str, tuple[Layer, Pattern]]
) -> None:
    """All processes have the same settings, patterns and weights."""
    if ranks.several:
        wanted = {name: str(pattern) for name, (_, pattern) in chosen.items()}
        ranks.require_same("the call", dict(settings) | wanted)
        weights = {name: checksum(layer.weight) for name, (layer, _) in chosen.items()}
        ranks.require_same("a weight", weights)


def _statistics(
    method: Method, unpruned: Unpruned, calibrated: bool, ranks: Ranks
) -> dict[str, Tensor]:
    """What the method's score reads of the whole model, by layer; nothing for most methods."""
    if method.statistic is None:
        return {}
    own: dict[str, Tensor] = {}
    if unpruned.batches or not method.needs_calibration:  # a process may have no batches
        own = method.statistic(unpruned)
    if not (calibrated and method.needs_calibration):
        return own
    weights = {name: layer.weight for name, (layer, _) in unpruned.layers.items()}
    return mean_over_ranks(own, len(unpruned.batches), weights, ranks)


def _reached(
    chosen: Mapping[str, tuple[Layer, Pattern]],
    statistics: Mapping[str, Tensor],
    dense: dict[str, tuple[Prunable, str]],
) -> dict[str, tuple[Layer, Pattern]]:
    """The layers that have a statistic; the others join the dense ones."""
    for name, (layer, _) in chosen.items():
        if name not in statistics:
            dense[name] = (layer.modules[0], "no gradient reaches it")
    if not any(name in statistics for name in chosen):
        raise ValueError(
            "prune: no gradient reaches any of the layers to prune; compute the loss from the "
            "model's output, without torch.no_grad() or .detach()"
        )
    return {name: each for name, each in chosen.items() if name in statistics}


def _calibrated(
    calibration: Calibration,
    apply: Callable[[Iterable[Layer], Tensor], None],
    tokens: dict[str, int],
) -> list[Layer]:
    """Apply to each group once the groups before it are done; returns the unreached layers.

    `tokens` gets the number of tokens or patches that each layer saw.
    """
    with calibration:
        require_groups(calibration)
        for group in calibration.groups:
            # Passed on without a name here: the next one is made when this one is gone.
            apply(group.layers, calibration.moments(group))
            tokens.update((layer.name, calibration.count) for layer in group.layers)
            calibration.done(group)
        return calibration.unreached
