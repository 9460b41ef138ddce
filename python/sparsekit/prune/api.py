"""`prune`: from a dense model to one whose weights follow a pattern."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.patterns import Pattern, PatternChoice
from sparsekit.prune.allocate import (
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
from sparsekit.prune.layers import Layer
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.patches import PIXELS
from sparsekit.prune.reconstruct import (
    RECONSTRUCTIONS,
    Reconstruction,
    ReconstructionOptions,
    reconstruct,
    relative_error,
)
from sparsekit.prune.report import PrunedLayer, PruneReport
from sparsekit.prune.scan import PruneLayer
from sparsekit.prune.scores import Score, Unpruned
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
    if ranks.several:
        ranks.require_same(
            "the call",
            {
                "settings": (method, name, options, pixels, batches is None, loss is None, seed),
                "allocation": getattr(spread, "__name__", repr(spread)),
            }
            | {layer_name: str(wanted) for layer_name, (_, wanted) in chosen.items()},
        )
        ranks.require_same(
            "a weight", {n: checksum(layer.weight) for n, (layer, _) in chosen.items()}
        )
    statistics: dict[str, Tensor] = {}
    if chosen_method.statistic is not None:
        over_layers = spread is ALLOCATIONS["global"]
        if batches or not chosen_method.needs_calibration:
            statistics = chosen_method.statistic(
                Unpruned(model, chosen, batches or (), seed, over_layers)
            )
        if batches is not None and chosen_method.needs_calibration:
            weights = {layer_name: layer.weight for layer_name, (layer, _) in chosen.items()}
            statistics = mean_over_ranks(statistics, len(batches), weights, ranks)
        for layer_name in [each for each in chosen if each not in statistics]:
            layer, _ = chosen.pop(layer_name)
            dense[layer_name] = (layer.modules[0], "no gradient reaches it")
        if not chosen:
            raise ValueError(
                "prune: no gradient reaches any of the layers to prune; compute the loss from the "
                "model's output, without torch.no_grad() or .detach()"
            )
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
    run = _Run(patterns, chosen_method.score, solve, options, statistics)
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
                _warn_of_few(tokens, layers, stacklevel=5)  # beyond both decorators
    left = [
        _describe(layer_name, module.weight, None, reason=reason)
        for layer_name, (module, reason) in dense.items()
    ]
    seconds = time.perf_counter() - started
    return PruneReport(method, name, (*run.done, *left), run.masks, seconds)


class _Run:
    """The layers done so far."""

    def __init__(
        self,
        patterns: Mapping[str, Pattern],
        score: Score,
        solve: Reconstruction,
        options: ReconstructionOptions,
        statistics: Mapping[str, Tensor],
    ) -> None:
        self.done: list[PrunedLayer] = []
        self.masks: dict[str, Tensor] = {}
        self._patterns = patterns
        self._score = score
        self._statistics = statistics
        self._solve = solve
        self._options = options

    def prune(self, layer: Layer, moments: Tensor | None) -> None:
        """Prune one layer, with the second moments `[groups, k, k]` of its inputs or without."""
        started = time.perf_counter()
        wanted = self._patterns[layer.name]
        weight = layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        before = layer.matrices(weight.to(dtype, copy=True), wanted)
        if moments is not None:
            moments = layer.pad_moments(moments, wanted)
        statistic = self._statistics.get(layer.name)
        if statistic is not None:
            statistic = layer.matrices(statistic.to(weight.device), wanted)
        try:
            after, mask = reconstruct(
                self._solve, before, wanted, self._score, moments, self._options, statistic
            )
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"prune: the inputs of layer {layer.name!r} are too alike to invert their second "
                f"moment with dampening={self._options.dampening}; raise it, or pass more "
                "calibration data"
            ) from error
        weight.copy_(layer.from_matrices(after))
        self.masks[layer.name] = layer.from_matrices(mask)
        lost = None
        if moments is not None:
            lost = relative_error(before, layer.matrices(weight.to(dtype), wanted), moments)
        reason = f"{wanted} keeps all of it" if bool(self.masks[layer.name].all()) else ""
        seconds = time.perf_counter() - started
        self.done.append(_describe(layer.name, weight, wanted, lost, reason, seconds))


def _calibrated(
    calibration: Calibration,
    apply: Callable[[Iterable[Layer], Tensor], None],
    tokens: dict[str, int],
) -> list[Layer]:
    """Apply to each group once the groups before it are done; returns the unreached layers.

    `tokens` gets the number of tokens or patches that each layer saw.
    """
    with calibration:
        _require_groups(calibration)
        for group in calibration.groups:
            # Passed on without a name here: the next one is made when this one is gone.
            apply(group.layers, calibration.moments(group))
            tokens.update((layer.name, calibration.count) for layer in group.layers)
            calibration.done(group)
        return calibration.unreached


def _require_groups(calibration: Calibration) -> None:
    if not calibration.groups:
        some = ", ".join(repr(layer.name) for layer in calibration.unreached[:5])
        raise ValueError(
            f"prune: no calibration batch runs any of the layers to prune ({some}); check that "
            "the batches go through them"
        )


def _warn_of_few(tokens: Mapping[str, int], layers: Iterable[Layer], stacklevel: int) -> None:
    """One warning for all layers whose second moment cannot have full rank."""
    needed = {layer.name: layer.weight.shape[1:].numel() for layer in layers}
    short = [name for name, count in tokens.items() if count < needed[name]]
    if short:
        worst = min(short, key=lambda name: tokens[name] / needed[name])
        others = f" ({len(short) - 1} more layers lack some too)" if len(short) > 1 else ""
        warnings.warn(
            f"prune: layer {worst!r} saw {tokens[worst]} calibration tokens or patches, and the "
            f"second moment of its inputs needs at least {needed[worst]}{others}: dampening makes "
            "up for the rest; pass more calibration data",
            UserWarning,
            stacklevel=stacklevel,
        )


def choose_method(
    method: str, reconstruction: str | None, calibrated: bool
) -> tuple[Method, str, Reconstruction]:
    """The method, and the name and function of its reconstruction.

    Raises:
        ValueError: unknown, or calibration missing where it is needed.
    """
    chosen: Method = _lookup(METHODS, method, "method")
    name = chosen.reconstruction if reconstruction is None else reconstruction
    solve: Reconstruction = _lookup(RECONSTRUCTIONS, name, "reconstruction")
    if not calibrated and (chosen.needs_calibration or name != "none"):
        raise ValueError(
            f"prune: method {method!r} with reconstruction {name!r} needs calibration data; pass "
            "calibration=batches, or use method='magnitude'"
        )
    return chosen, name, solve


def layer_pruner(
    method: Method,
    solve: Reconstruction,
    options: ReconstructionOptions,
    statistics: Callable[[Pattern], Mapping[str, Tensor]],
) -> PruneLayer:
    """Prunes one layer by itself, to see what comes of it.

    Args:
        method: its score.
        solve: reconstruction.
        options: of that.
        statistics: the method's, for a pattern.
    """

    def prune_layer(layer: Layer, wanted: Pattern, moments: Tensor | None) -> None:
        run = _Run({layer.name: wanted}, method.score, solve, options, statistics(wanted))
        run.prune(layer, moments)

    return prune_layer


def _lookup(registry: dict[str, Any], name: str, what: str) -> Any:
    try:
        return registry[name]
    except KeyError:
        raise ValueError(
            f"prune: unknown {what} {name!r}; known are {', '.join(sorted(registry))}"
        ) from None


def check_weight(layer: Layer) -> None:
    """Refuse a weight that is empty or not finite.

    Raises:
        ValueError: it is.
    """
    weight = layer.weight
    if weight.numel() == 0:
        raise ValueError(
            f"prune: the weight of {layer.name!r} is empty {list(weight.shape)}; "
            "leave it out with ignore="
        )
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"prune: the weight of {layer.name!r} holds {bad} NaN or infinite values; "
            "repair the checkpoint or leave the layer out with ignore="
        )


def _describe(
    name: str,
    weight: Tensor,
    pattern: Pattern | None,
    error: float | None = None,
    reason: str = "",
    seconds: float = 0.0,
) -> PrunedLayer:
    zeros = 1.0 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0
    shape = tuple(weight.shape)
    spelling = None if pattern is None else str(pattern)
    return PrunedLayer(name, shape, spelling, zeros, error, reason, seconds)
