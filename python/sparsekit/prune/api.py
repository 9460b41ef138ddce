"""`prune`: from a dense model to one whose weights follow a pattern."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.patterns import Pattern, PatternChoice
from sparsekit.prune.calibration import CACHE_BYTES, Calibration, Loss, read_batches
from sparsekit.prune.distributed import DistributedChoice, Ranks, checksum, together
from sparsekit.prune.layers import Layer
from sparsekit.prune.methods import METHODS
from sparsekit.prune.patches import PIXELS
from sparsekit.prune.reconstruct import (
    RECONSTRUCTIONS,
    Reconstruction,
    ReconstructionOptions,
    reconstruct,
    relative_error,
)
from sparsekit.prune.report import PrunedLayer, PruneReport
from sparsekit.prune.scores import Score
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
        method: a name in `METHODS`: "magnitude", "wanda", "sparsegpt".
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
            by it alone.
        distributed: several processes calibrate together, each on batches of its own (one may have
            none), and end with equal masks and weights: True for the default process group of
            `torch.distributed`, or a `ProcessGroup`. Every process calls this with the same model
            and settings; when one fails, all raise.

    Returns:
        What was done to each layer, with the masks.

    Raises:
        ValueError: unknown method or reconstruction, a number of pixels below 1, calibration
            missing where it is needed, empty, exhausted or not made of batches, no layer to prune,
            a weight that is empty or holds NaN or infinities: the model is as before. Inputs of a
            layer that hold NaN or infinities, or cannot be inverted: the layers before it are
            pruned already. With `distributed`, a process group that is not there, or other weights
            or settings in another process.
        RuntimeError: another process failed by something else than a ValueError.
    """
    ranks = Ranks.of(distributed)
    started = time.perf_counter()
    chosen_method = _lookup(METHODS, method, "method")
    name = chosen_method.reconstruction if reconstruction is None else reconstruction
    solve = _lookup(RECONSTRUCTIONS, name, "reconstruction")
    if calibration is None and (chosen_method.needs_calibration or name != "none"):
        raise ValueError(
            f"prune: method {method!r} with reconstruction {name!r} needs calibration data; pass "
            "calibration=batches, or use method='magnitude'"
        )
    if pixels < 1:
        raise ValueError(f"prune: pixels must be at least 1, got {pixels}")
    options = ReconstructionOptions(solver_block, dampening)
    batches = None
    if calibration is not None:
        batches = read_batches(calibration, loss=loss, may_be_empty=ranks.several)
    chosen, dense = choose_layers(model, pattern, targets, ignore)
    for layer, _ in chosen.values():
        _check_weight(layer)
    patterns = {layer_name: wanted for layer_name, (_, wanted) in chosen.items()}
    layers = [layer for layer, _ in chosen.values()]
    if ranks.several:
        settings = (method, name, options, pixels, calibration is not None, loss is not None)
        ranks.require_same(
            "the call", {"settings": settings} | {n: str(p) for n, p in patterns.items()}
        )
        ranks.require_same("a weight", {layer.name: checksum(layer.weight) for layer in layers})
    run = _Run(patterns, chosen_method.score, solve, options)
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
            for layer in _calibrated(
                Calibration(model, batches, layers, cache_bytes, pixels, ranks), apply
            ):
                dense[layer.name] = (layer.modules[0], "no calibration batch runs it")
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
    ) -> None:
        self.done: list[PrunedLayer] = []
        self.masks: dict[str, Tensor] = {}
        self._patterns = patterns
        self._score = score
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
        try:
            after, mask = reconstruct(
                self._solve, before, wanted, self._score, moments, self._options
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
        seconds = time.perf_counter() - started
        self.done.append(_describe(layer.name, weight, wanted, lost, seconds=seconds))


def _calibrated(
    calibration: Calibration, apply: Callable[[Iterable[Layer], Tensor], None]
) -> list[Layer]:
    """Apply to each group once the groups before it are done; returns the unreached layers."""
    with calibration:
        for group in calibration.groups:
            # Passed on without a name here: the next one is made when this one is gone.
            apply(group.layers, calibration.moments(group))
            calibration.done(group)
        return calibration.unreached


def _lookup(registry: dict[str, Any], name: str, what: str) -> Any:
    try:
        return registry[name]
    except KeyError:
        raise ValueError(
            f"prune: unknown {what} {name!r}; known are {', '.join(sorted(registry))}"
        ) from None


def _check_weight(layer: Layer) -> None:
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
