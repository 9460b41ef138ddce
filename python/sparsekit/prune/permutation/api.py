"""`permute`: reorder the channels of a whole network so that its pattern keeps more.

`Trace` finds out which channels may change places, the search of Pool & Yu 2021 ("Channel
Permutations for N:M Sparsity", NeurIPS) looks for good orders of them, and the example is run again
to prove that the network still computes what it did.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.patterns import NM, BlockSparse, PatternChoice
from sparsekit.prune.calibration import Batch, read_batches
from sparsekit.prune.layers import Layer
from sparsekit.prune.modes import eval_mode
from sparsekit.prune.permutation.by_hand import known
from sparsekit.prune.permutation.freedom import Atoms, Freedom, appearance
from sparsekit.prune.permutation.swaps import Blocks, Search, Term, Vectors, column_terms, rows_of
from sparsekit.prune.permutation.trace import Dimension, Trace, tensors_in
from sparsekit.prune.report import as_text
from sparsekit.prune.targets import choose_layers


@dataclass(frozen=True)
class PermutedLayer:
    """One layer of a `PermuteReport`.

    Attributes:
        name: dotted module name.
        pattern: what it is going to follow, None when `prune` would leave it dense.
        channels: input channels.
        free: how many of them may change places.
        before: share of the score that the pattern kept, from 0 to 1; None when it stays dense.
        after: share that it keeps now.
        reason: why channels keep their places, or why the layer stays dense.
    """

    name: str
    pattern: str | None
    channels: int
    free: int
    before: float | None
    after: float | None
    reason: str = ""


@dataclass(frozen=True)
class PermuteReport:
    """Result of `permute`. `print(report)` shows a table, one line per layer.

    Attributes:
        applied: whether the model was changed.
        reason: why it was not.
        difference: ‖y' - y‖ / ‖y‖ of the output that changed most when the orders were applied.
        layers: one entry per chosen layer.
        orders: name of a parameter or buffer -> dimension -> its new order: position p took what
            was at `order[p]`. Empty when the model was not changed.
        seconds: wall time.
    """

    applied: bool
    reason: str
    difference: float
    layers: tuple[PermutedLayer, ...]
    orders: Mapping[str, Mapping[int, Tensor]] = field(repr=False)
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the orders, as plain values for JSON."""
        return {
            "applied": self.applied,
            "reason": self.reason,
            "difference": self.difference,
            "seconds": self.seconds,
            "layers": [vars(layer).copy() for layer in self.layers],
        }

    def __rich__(self) -> RenderableType:
        table = Table()
        for heading in ("layer", "pattern"):
            table.add_column(heading, overflow="fold")
        for heading in ("channels", "free", "kept before", "kept after"):
            table.add_column(heading, justify="right")
        table.add_column("note", overflow="fold")
        for one in self.layers:
            table.add_row(
                one.name or "(model)",
                one.pattern or "dense",
                str(one.channels),
                str(one.free),
                "" if one.before is None else f"{one.before:.2%}",
                "" if one.after is None else f"{one.after:.2%}",
                one.reason,
            )
        said = f"applied, outputs differ by {self.difference:.1e}" if self.applied else self.reason
        return Group(f"permute: {said}; {self.seconds:.1f} s", table)

    def __str__(self) -> str:
        return as_text(self)


@torch.no_grad()
def permute(
    model: nn.Module,
    pattern: PatternChoice,
    example_inputs: Any,
    *,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    rounds: int = 200,
    rows: int = 2048,
    progress: bool = True,
) -> PermuteReport:
    """Reorder the channels of a model in place so that a pattern keeps more of its weights.

    The model is run on the example, operation by operation, to find out which channels may change
    places: the hidden features of an MLP, those of each head between the value and the output
    projection, the channels of a residual stream, and whatever else the operations allow. A channel
    that meets an operation which is not understood keeps its place. Then good orders are looked
    for, applied to every parameter and buffer that sees these channels, and the example is run
    again: where its outputs changed by more than rounding, the model is given back as it was.

    All layers that see a channel count with what they keep: those that read it, as columns, and for
    vectors and blocks those that make it, as rows. Where patterns of several widths read the same
    channels, each is searched for in turn, and what is found stays when the sum over all layers
    rises.

    To be done before `prune`, on the dense model; optimizers and masks are made afterwards. Needs
    no gradients and no data but the example. Pool & Yu 2021, "Channel Permutations for N:M
    Sparsity", NeurIPS.

    Args:
        model: changed in place. It runs in eval mode, and three times.
        pattern: as for `prune`.
        example_inputs: one batch that the model is called with: a tensor, a tuple or list of
            positional arguments, or a mapping of keyword arguments. It must take every path
            through the model whose weights other inputs would use; parameters that it does not
            reach keep their order. Outputs keep their order as well, so ask for nothing more than
            needed: with `use_cache=False` a language model's keys and values are no outputs.
        targets: as for `prune`.
        ignore: as for `prune`.
        scores: name of a layer -> how much each of its weights matters, of the weight's shape, for
            instance `|W| · ‖x‖`; others count by `|W|`.
        rounds: most rounds of swaps and cycles in each search.
        rows: most rows that a search looks at; of more, this many evenly spaced ones.
        progress: show a progress bar.

    Returns:
        What each layer keeps before and after, and why channels kept their places.

    Raises:
        ValueError: as for `prune` about patterns and layers; scores that fit no layer; `rounds` or
            `rows` below 1; an example that is no batch, or a model whose outputs hold no tensors.
    """
    started = time.perf_counter()
    for name, value in (("rounds", rounds), ("rows", rows)):
        if value < 1:
            raise ValueError(f"permute: {name} must be at least 1, got {value}")
    (batch,) = read_batches([example_inputs], "example_inputs")
    chosen, dense = choose_layers(model, pattern, targets, ignore)
    weights = [
        _Weight(layer, known(wanted, "permute"), _score(layer, scores or {}))
        for layer, wanted in chosen.values()
    ]
    _check_names(scores or {}, chosen)
    with _quiet(model):
        before = _outputs(model, batch)
        dimensions, freedom = _traced(model, batch)
        orders = Orders(freedom, dimensions, weights)
        first = [weight.share(orders) for weight in weights]
        orders.improve(rounds, rows, progress)
        changes = orders.changes()
        reason, difference = "", 0.0
        if not changes:
            reason = "no order was found that keeps more"
        else:
            _apply(changes, inverse=False)
            reason, difference = _compare(before, _outputs(model, batch))
            if reason:
                _apply(changes, inverse=True)
    applied = not reason
    last = [weight.share(orders) for weight in weights] if applied else first
    layers = [
        weight.describe(freedom, orders, *shares)
        for weight, *shares in zip(weights, first, last, strict=True)
    ]
    layers += [
        PermutedLayer(name, None, module.weight.shape[1], 0, None, None, why)
        for name, (module, why) in dense.items()
    ]
    by_name: dict[str, dict[int, Tensor]] = {}
    for name, dimension, order in changes if applied else []:
        by_name.setdefault(name, {})[dimension.axis] = order
    seconds = time.perf_counter() - started
    return PermuteReport(applied, reason, difference, tuple(layers), by_name, seconds)


# --- the weights that are to keep more --------------------------------------------------------


class _Weight:
    """A layer that the pattern prunes, and the dimensions of its weight."""

    def __init__(self, layer: Layer, pattern: NM | BlockSparse, score: Tensor) -> None:
        self.layer, self.pattern, self.score = layer, pattern, score
        self.total = float(score.sum(dtype=torch.float64))
        self.axes: dict[int, Atoms] = {}

    def tile(self, axis: int) -> int:
        """Positions along a dimension of the weight that are decided together."""
        return self.pattern.row_tile if axis == 0 else self.pattern.k_tile

    def ordered(self, orders: Orders) -> Tensor:
        """The score in the orders found so far."""
        score = self.score
        for axis, atoms in self.axes.items():
            if orders.moves(atoms):
                score = score.index_select(axis, orders.order(atoms).to(score.device))
        return score

    def kept(self, orders: Orders) -> float:
        """What the pattern keeps in the orders found so far."""
        out = 0.0
        for matrix in self.layer.matrices(self.ordered(orders), self.pattern):
            columns = torch.arange(matrix.shape[1], device=matrix.device)
            search = Search(column_terms([rows_of(matrix, self.pattern)], self.pattern))
            out += search.kept(columns)
        return out

    def share(self, orders: Orders) -> float:
        return self.kept(orders) / self.total if self.total else 1.0

    def describe(
        self, freedom: Freedom, orders: Orders, before: float, after: float
    ) -> PermutedLayer:
        atoms = self.axes.get(1)
        channels = self.score.shape[1]
        free = freedom.free(atoms) if atoms is not None else np.zeros(channels, bool)
        reason = ""
        if atoms is not None and not free.all():
            reason = freedom.reason(int(atoms[~free][0]))
        name, pattern = self.layer.name, str(self.pattern)
        return PermutedLayer(name, pattern, channels, int(free.sum()), before, after, reason)


def _score(layer: Layer, scores: Mapping[str, Tensor]) -> Tensor:
    score = scores.get(layer.name, layer.weight.detach())
    if score.shape != layer.weight.shape:
        raise ValueError(
            f"permute: the scores of {layer.name!r} have shape {list(score.shape)}, its weight has "
            f"{list(layer.weight.shape)}; pass one score for each weight"
        )
    if not bool(score.isfinite().all()):
        what = "scores" if layer.name in scores else "weight"
        raise ValueError(f"permute: the {what} of {layer.name!r} holds NaN or infinities")
    return score.to(torch.promote_types(score.dtype, torch.float32)).abs()


def _check_names(scores: Mapping[str, Tensor], chosen: Mapping[str, Any]) -> None:
    for name in scores:
        if name not in chosen:
            some = ", ".join(map(repr, list(chosen)[:5]))
            raise ValueError(
                f"permute: scores are for {name!r}, which is no layer to prune; those are {some}"
                + (f" and {len(chosen) - 5} more" if len(chosen) > 5 else "")
            )


# --- orders -----------------------------------------------------------------------------------


class Orders:
    """The orders found so far, and the search for better ones.

    Args:
        freedom: which channels may change places.
        dimensions: of every parameter and buffer.
        weights: whose scores count.
    """

    def __init__(
        self,
        freedom: Freedom,
        dimensions: Mapping[str, Sequence[Dimension]],
        weights: Sequence[_Weight],
    ) -> None:
        self._freedom, self._dimensions, self._weights = freedom, dimensions, weights
        self._moved: Atoms = np.arange(len(freedom.channel))
        by_tensor = {id(one.tensor): all_ for all_ in dimensions.values() for one in all_}
        for weight in weights:
            found = by_tensor.get(id(weight.layer.weight), ())
            weight.axes = {one.axis: one.atoms for one in found}

    def moves(self, atoms: Atoms) -> bool:
        channels = self._freedom.channel[atoms]
        return bool((self._moved[channels] != channels).any())

    def order(self, atoms: Atoms) -> Tensor:
        return torch.as_tensor(self._freedom.order(atoms, self._moved))

    def changes(self) -> list[tuple[str, Dimension, Tensor]]:
        """What to reorder in the model."""
        return [
            (name, one, self.order(one.atoms))
            for name, dimensions in self._dimensions.items()
            for one in dimensions
            if self.moves(one.atoms)
        ]

    def improve(self, rounds: int, rows: int, progress: bool) -> None:
        """Search in turn wherever some weight has channels side by side."""
        for stage in tqdm(list(self._stages()), desc="permute", disable=not progress):
            before = self._moved
            kept = self._kept(stage)
            self._moved = self._searched(stage, rounds, rows)
            # The search sees groups that lie alike, and a part of the rows.
            if not self._kept(stage) > kept:
                self._moved = before

    def _kept(self, stage: _Stage) -> float:
        return sum(weight.kept(self) for weight in stage.weights)

    def _stages(self) -> Iterator[_Stage]:
        """Columns first, then rows; the dimension with most channels first."""
        together: set[tuple[int, int]] = set()
        for axis in (1, 0):
            using = [one for one in self._weights if axis in one.axes and one.tile(axis) > 1]
            done: set[tuple[int, int]] = set() if axis else together
            for weight in sorted(using, key=lambda one: -len(one.axes[axis])):
                atoms, width = weight.axes[axis], weight.tile(axis)
                blocks = np.unique(self._freedom.block[self._freedom.channel[atoms]])
                wanted = {(width, int(b)) for b in blocks if self._freedom.sizes[b] > 1} - done
                done |= wanted
                together |= wanted
                if wanted:
                    yield _Stage(self._freedom, self._weights, axis, width, atoms, wanted)

    def _searched(self, stage: _Stage, rounds: int, rows: int) -> Atoms:
        terms = stage.terms(self, rows)
        if not terms:
            return self._moved
        found = Search(terms, torch.as_tensor(stage.parts)).run(rounds).cpu().numpy()
        slots = stage.slots
        order = (found[:, None] * stage.unit + np.arange(stage.unit)).ravel()
        moved = self._moved.copy()
        moved[slots] = self._moved[slots[order]]
        return moved


class _Stage:
    """One search: channels that lie side by side in some weight.

    Attributes:
        weights: whose kept scores hang on the order of these channels.
        slots: `[n]`, the channels that have a place, in the order of the dimension; those of other
            blocks stay where they are.
        unit: channels that move together: a whole group of the columns where the vectors or blocks
            are taller than it is wide, so that rows can be chosen at no cost to the columns.
        parts: `[n / unit]`; units change places within their part alone.
    """

    def __init__(
        self,
        freedom: Freedom,
        weights: Sequence[_Weight],
        axis: int,
        width: int,
        atoms: Atoms,
        wanted: set[tuple[int, int]],
    ) -> None:
        self._freedom, self._axis, self._width = freedom, axis, width
        channels = freedom.channel[atoms]
        self.slots = channels[np.sort(np.unique(channels, return_index=True)[1])]
        self._place = np.full(len(freedom.channel), -1)
        self._place[self.slots] = np.arange(len(self.slots))
        blocks = freedom.block[self.slots]
        free = np.isin(blocks, [block for _, block in wanted])
        self.weights = [
            one
            for one in weights
            if any(
                self._touches(one.axes[a], free)
                for a in (0, 1)
                if a in one.axes and one.tile(a) > 1
            )
        ]
        keys = [np.where(free, blocks, -1 - np.arange(len(blocks)))]
        self.unit = 1
        if axis == 0:
            # What was found for the columns shall stay: groups of them stay together.
            reading = [
                one
                for one in self.weights
                if 1 in one.axes and one.tile(1) > 1 and self._touches(one.axes[1], free)
            ]
            widths = {one.tile(1) for one in reading}
            if len(widths) == 1 and width > max(widths) and width % max(widths) == 0:
                self.unit = max(widths)
            for one in reading:
                for positions in self._views(one.axes[1]):
                    keys.append(np.where(positions < 0, -1, positions // one.tile(1)))
        if len(self.slots) % self.unit:
            self.unit = 1
        whole = np.stack(keys, 1).reshape(-1, self.unit, len(keys))
        own = whole[:, 0].copy()
        if self.unit > 1:  # groups may change places, unless one is torn
            torn = (whole != whole[:, :1]).any((1, 2))
            own = own[:, :1]
            own[torn, 0] = -1 - len(blocks) - np.flatnonzero(torn)
        self.parts = np.unique(own, axis=0, return_inverse=True)[1].reshape(-1)

    def terms(self, orders: Orders, rows: int) -> list[Term]:
        """What the search adds up, from at most so many rows."""
        columns: dict[NM | BlockSparse, list[Tensor]] = {}
        other: list[tuple[_Weight, Tensor]] = []
        for one in self.weights:
            score = one.ordered(orders)
            if self._axis == 1 and 1 in one.axes and one.pattern.k_tile == self._width:
                seen = self._seen(rows_of(score, one.pattern).t(), one.axes[1])
                columns.setdefault(one.pattern, []).extend([part.t() for part in seen])
            if 0 in one.axes and one.pattern.row_tile == self._width and one.layer.groups == 1:
                matrix = one.layer.matrices(score, one.pattern)[0]
                missing = -matrix.shape[1] % one.pattern.k_tile
                folded = F.pad(matrix, (0, missing)).unflatten(1, (-1, one.pattern.k_tile)).mT
                if isinstance(one.pattern, BlockSparse):
                    folded = folded.sum(1)
                other += [(one, part) for part in self._seen(folded, one.axes[0])]
        total = sum(len(part) for parts in columns.values() for part in parts)
        total += sum(part[0].numel() for _, part in other)
        step = -(-total // rows)
        terms: list[Term] = []
        for pattern, parts in columns.items():
            terms += column_terms(parts, pattern, step) if parts else []
        width = self._width // self.unit
        for one, part in other:
            part = part[..., ::step].unflatten(0, (-1, self.unit)).sum(1)
            if isinstance(one.pattern, NM):
                terms.append(Vectors(part, one.pattern, width))
            else:
                blocks = -(-len(part) // width) * part.shape[1]
                terms.append(Blocks(part, width, round((1 - one.pattern.sparsity) * blocks)))
        return terms

    def _touches(self, atoms: Atoms, free: npt.NDArray[np.bool_]) -> bool:
        places = self._place[self._freedom.channel[atoms]]
        return bool(free[places[places >= 0]].any())

    def _views(self, atoms: Atoms) -> Iterator[Atoms]:
        """For each appearance of the slots along a dimension: their positions, -1 for none."""
        channels = self._freedom.channel[atoms]
        nth = appearance(channels)
        places = self._place[channels]
        for index in range(int(nth[places >= 0].max(initial=-1)) + 1):
            here = np.flatnonzero((nth == index) & (places >= 0))
            positions = np.full(len(self.slots), -1)
            positions[places[here]] = here
            yield positions

    def _seen(self, scores: Tensor, atoms: Atoms) -> list[Tensor]:
        """Scores `[positions, ...]` as scores of the slots, where these share the same groups."""
        out = []
        group = np.arange(len(self.slots)) // self._width
        for positions in self._views(atoms):
            there = positions // self._width
            pairs = np.unique(np.stack([group, there])[:, positions >= 0], axis=1)
            alike = pairs[:, _once(pairs[0]) & _once(pairs[1])]
            good = (positions >= 0) & np.isin(group, alike[0])
            if good.any():
                seen = scores.new_zeros(len(good), *scores.shape[1:])
                where = torch.as_tensor(good, device=scores.device)
                seen[where] = scores[torch.as_tensor(positions[good], device=scores.device)]
                out.append(seen)
        return out


def _once(values: Atoms) -> npt.NDArray[np.bool_]:
    """Which of the values no other one equals."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse.reshape(-1)] == 1


# --- running the model ------------------------------------------------------------------------


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """In eval mode, with random numbers of its own."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), eval_mode(model):
        yield


def _outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {path: tensor.clone() for path, tensor in tensors_in(batch(model))}
    if not found:
        raise ValueError(
            "permute: the model's outputs hold no tensors, so nothing would prove that it computes "
            "the same; wrap it so that it returns some"
        )
    return found


def _traced(model: nn.Module, batch: Batch) -> tuple[dict[str, list[Dimension]], Freedom]:
    torch.manual_seed(0)
    trace = Trace(model)
    trace.fix(batch.args, "input")
    trace.fix(batch.kwargs, "input")
    fused = torch.backends.mha.get_fastpath_enabled()
    # nn.TransformerEncoderLayer shall compute what its fused path does in separate operations.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with trace:
            output = batch(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    trace.fix(output, "output")
    return trace.dimensions, trace.freedom()


def _apply(changes: Sequence[tuple[str, Dimension, Tensor]], inverse: bool) -> None:
    for _, dimension, order in changes:
        tensor = dimension.tensor
        index = (order.argsort() if inverse else order).to(tensor.device)
        tensor.copy_(tensor.index_select(dimension.axis, index))


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, float]:
    """(why the outputs are not the same, or "", their largest relative difference).

    A new order of a sum changes its last digits, and those of all that follows: half of the digits
    must agree.
    """
    if before.keys() != after.keys():
        return "the outputs have another structure in the orders found; the model is as before", 0.0
    worst = 0.0
    for path, old in before.items():
        new = after[path]
        where = f"output{path}"
        if old.shape != new.shape:
            return f"{where} has another shape in the orders found; the model is as before", worst
        if not old.is_floating_point():
            if not torch.equal(old, new):
                return f"{where} differs in the orders found; the model is as before", worst
            continue
        finite = old.isfinite()
        scale = float(torch.where(finite, old, 0).double().norm())
        apart = float(torch.where(finite, new - old, 0).double().norm())
        difference = apart / scale if scale else apart
        worst = max(worst, difference)
        allowed = torch.finfo(old.dtype).eps ** 0.5
        same = torch.equal(old[~finite].nan_to_num(), new[~finite].nan_to_num())
        if not (difference <= allowed and same):
            return (
                f"{where} differs by {difference:.1e} of its norm in the orders found, more than "
                f"rounding explains ({allowed:.1e}); the model is as before"
            ), worst
    return "", worst
