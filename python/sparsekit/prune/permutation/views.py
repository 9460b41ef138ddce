"""Rules for operations that only move or pick values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sparsekit.prune.permutation.freedom import Atoms
from sparsekit.prune.permutation.rules import (
    Call,
    Entry,
    Label,
    depends,
    drop,
    letters_of,
    rule,
    unknown,
)

PLACED = "they are cut into, or joined from, parts of a fixed order"


# --- the same values, other dimensions --------------------------------------------------------


@rule("permute")
def _permute(call: Call) -> Label:
    return _transposed(call.label(call.first), [axis % call.first.dim() for axis in call["dims"]])


@rule("transpose", "transpose_", "t", "t_", "swapaxes")
def _transpose(call: Call) -> Label:
    rank = call.first.dim()
    order = list(range(rank))
    if rank > 1:
        one, other = call.get("dim0", "axis0"), call.get("dim1", "axis1")
        one, other = (0, 1) if one is None else (one % rank, other % rank)
        order[one], order[other] = other, one
    return _transposed(call.label(call.first), order)


def _transposed(label: Label, order: Sequence[int]) -> Label:
    return [_map(label[axis], lambda atoms: atoms.transpose(order)) for axis in order]


def _map(entry: Entry, change: Callable[[Atoms], Atoms]) -> Entry:
    return change(entry) if isinstance(entry, np.ndarray) else entry


@rule("unsqueeze", "unsqueeze_")
def _unsqueeze(call: Call) -> Label:
    return _added(call.label(call.first), call["dim"] % (len(call.shape) + 1))


@rule("squeeze", "squeeze_", "view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten")
@rule("flatten", "view_copy", "_reshape_copy")
def _view(call: Call) -> Label:
    return reshape(call, call.label(call.first), call.shape, call.output.shape)


@rule("as_strided", "as_strided_")
def _as_strided(call: Call) -> Label | list[Label]:
    """Understood where it adds or drops dimensions of size 1."""
    before = [pair for pair in zip(call.shape, call.strides, strict=True) if pair[0] != 1]
    out = call.output
    after = [pair for pair in zip(out.shape, out.stride(), strict=True) if pair[0] != 1]
    if before != after:
        return unknown(call)
    return reshape(call, call.label(call.first), call.shape, out.shape)


def reshape(call: Call, label: Label, old: Sequence[int], new: Sequence[int]) -> Label:
    """Labels of a tensor of shape `old` seen as one of shape `new`.

    Both shapes are cut into the same finest dimensions; those that the old one merged are split
    first, then those that the new one merges are joined.
    """
    fine = _common(old, new)
    if fine is None:
        for entry in label:
            call.freeze(entry, call.unknown)
        return [call.unknown] * len(new)
    return _join(call, _split(call, label, old, fine), fine, new)


def _common(old: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """The coarsest sizes that both shapes can be merged from; None where there are none."""
    if 0 in old:
        return None
    ends = sorted({end for shape in (old, new) for end in np.cumprod(shape, dtype=np.int64)} | {1})
    if any(later % earlier for earlier, later in pairwise(ends)):
        return None
    return [int(later // earlier) for earlier, later in pairwise(ends)]


def _runs(shape: Sequence[int], fine: Sequence[int]) -> list[range]:
    """For each dimension, the finest ones it is made of (none for a size of 1)."""
    runs, at = [], 0
    for size in shape:
        start = at
        while size > 1:
            size //= fine[at]
            at += 1
        runs.append(range(start, at))
    return runs


def _split(call: Call, label: Label, old: Sequence[int], fine: Sequence[int]) -> Label:
    runs = _runs(old, fine)
    out: Label = [None] * len(fine)
    for axis, (entry, run) in enumerate(zip(label, runs, strict=True)):
        if not isinstance(entry, np.ndarray) or not run:
            for one in run:
                out[one] = entry
            continue
        shape = [
            size
            for dimension, pieces in enumerate(runs)
            for size in ((fine[p] if entry.shape[dimension] > 1 else 1) for p in pieces)
        ]
        atoms = entry.reshape(shape)
        differ = [p for p in run if _varies(atoms, p)]
        carrier = differ[-1] if differ else run[-1]
        if len(run) > 1:
            call.cut(entry, axis, _others(fine, run, carrier))
        for p in run:
            out[p] = PLACED
            if p not in differ:
                atoms = atoms.take([0], p)
        out[carrier] = atoms if differ else PLACED
    return out


def _varies(atoms: Atoms, axis: int) -> bool:
    return bool((atoms != atoms.take([0], axis)).any())


def _join(call: Call, label: Label, fine: Sequence[int], new: Sequence[int]) -> Label:
    runs = _runs(new, fine)
    out: Label = []
    for axis, run in enumerate(runs):
        carriers = sorted(
            (p for p in run if isinstance(label[p], np.ndarray)), key=fine.__getitem__
        )
        for p in carriers[:-1]:
            label[p] = call.freeze(label[p], "they are joined with other channels to one dimension")
        if not carriers:
            out.append(next((label[p] for p in run if label[p] is not None), None))
            continue
        atoms = _merged(label[carriers[-1]], runs, fine, axis)
        if len(run) > 1:
            call.cut(atoms, axis, _others(fine, run, carriers[-1]))
        out.append(atoms)
    return out


def _merged(entry: Entry, runs: Sequence[range], fine: Sequence[int], axis: int) -> Atoms:
    """Atoms over the finest dimensions as atoms over the runs of them."""
    assert isinstance(entry, np.ndarray)
    wide, shape = list(entry.shape), []
    for index, run in enumerate(runs):
        if index == axis or any(entry.shape[p] > 1 for p in run):
            for p in run:
                wide[p] = fine[p]
        shape.append(int(np.prod([wide[p] for p in run], dtype=np.int64)))
    return np.broadcast_to(entry, wide).reshape(shape)


def _others(fine: Sequence[int], run: range, carrier: int) -> Atoms:
    """For each position of a run, its index along all dimensions but the carrier."""
    sizes = [1 if p == carrier else fine[p] for p in run]
    index = np.arange(np.prod(sizes)).reshape(sizes)
    return np.broadcast_to(index, [fine[p] for p in run]).ravel()


# --- some of the values -----------------------------------------------------------------------


def picked(call: Call, label: Label, axis: int, index: Sequence[int]) -> Label:
    """The label of what stands at some indices along a dimension, in their order."""
    out: Label = []
    for dimension, entry in enumerate(label):
        if isinstance(entry, np.ndarray) and dimension == axis:
            inside = np.isin(np.arange(entry.shape[axis]), index)
            call.cut(entry, axis, inside.astype(np.int64))
        if isinstance(entry, np.ndarray) and entry.shape[axis] > 1:
            entry = entry.take(index, axis)
        out.append(None if dimension == axis and len(index) == 1 else entry)
    return out


@rule("slice", "narrow")
def _slice(call: Call) -> Label:
    x, axis = call.first, (call.get("dim") or 0) % call.first.dim()
    size, step = x.shape[axis], call.get("step") or 1
    start, stop, _ = slice(call.get("start"), call.get("end")).indices(size)
    index = range(start, stop, step)
    return call.label(x) if len(index) == size else picked(call, call.label(x), axis, index)


@rule("select")
def _select(call: Call) -> Label:
    x, axis = call.first, call["dim"] % call.first.dim()
    return drop(picked(call, call.label(x), axis, [call["index"] % x.shape[axis]]), [axis])


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def _split_up(call: Call) -> list[Label]:
    axis, at, labels = call["dim"] % call.first.dim(), 0, []
    for piece in call.output:
        index = range(at, at := at + piece.shape[axis])
        labels.append(picked(call, call.label(call.first), axis, index))
    return labels


@rule("unbind")
def _unbind(call: Call) -> list[Label]:
    axis = call["dim"] % call.first.dim()
    label = call.label(call.first)
    return [drop(picked(call, label, axis, [i]), [axis]) for i in range(call.first.shape[axis])]


@rule("glu")
def _glu(call: Call) -> Label:
    x = call.first
    axis, half = call["dim"] % x.dim(), x.shape[call["dim"]] // 2
    names = letters_of(x.dim())
    parts = [range(half), range(half, 2 * half)]
    return call.combine([(picked(call, call.label(x), axis, p), names) for p in parts], names)


@rule("expand", "broadcast_to", "expand_as")
def _expand(call: Call) -> Label:
    added = call.output.dim() - call.first.dim()
    label = [
        _map(entry, lambda atoms: atoms.reshape([1] * added + list(atoms.shape)))
        for entry in call.label(call.first)
    ]
    return [*[None] * added, *label]


@rule("repeat")
def _repeat(call: Call) -> Label:
    x, times = call.first, list(call["repeats"])
    label = _expand(call)
    for axis, count in enumerate(times):
        size = x.shape[axis - len(times)] if axis >= len(times) - x.dim() else 1
        if count == 1:
            continue
        for index, entry in enumerate(label):
            if isinstance(entry, np.ndarray) and (index == axis or entry.shape[axis] > 1):
                copies = np.concatenate([entry] * count, axis)
                if index == axis:
                    call.cut(copies, axis, np.repeat(np.arange(count), size))
                label[index] = copies
    return label


@rule("cat", "concat", "stack")
def _cat(call: Call) -> Label:
    tensors = [one for one in call.tensors if one.shape != (0,)]
    labels = [call.label(one) for one in tensors]
    rank = call.output.dim()
    axis = call["dim"] % rank
    if "stack" in call.name:
        labels = [_added(label, axis) for label in labels]
        sizes = [1] * len(tensors)
    else:
        sizes = [one.shape[axis] for one in tensors]
    out: Label = []
    for index in range(rank):
        entries = [label[index] for label in labels]
        if index != axis:
            out.append(_beside(call, entries, sizes, index, axis))
        elif all(entry is None for entry in entries) and len(entries) > 1:
            out.append(PLACED)
        elif all(isinstance(entry, np.ndarray) for entry in entries):
            pieces = [entry for entry in entries if isinstance(entry, np.ndarray)]
            atoms = _concatenated(pieces, sizes, axis)
            call.cut(atoms, axis, np.repeat(np.arange(len(sizes)), sizes))
            out.append(atoms)
        else:
            for entry in entries:
                call.freeze(entry, PLACED)
            out.append(PLACED)
    return out


def _beside(
    call: Call, entries: Sequence[Entry], sizes: Sequence[int], index: int, axis: int
) -> Entry:
    """The order of a dimension that all parts of a concatenation have."""
    if not any(isinstance(one, np.ndarray) and one.shape[axis] > 1 for one in entries):
        return call.meet(entries)
    if not all(isinstance(one, np.ndarray) for one in entries):
        for one in entries:
            call.freeze(one, PLACED)
        return PLACED
    # Each part has rows of its own.
    return _concatenated([one for one in entries if isinstance(one, np.ndarray)], sizes, axis)


def _concatenated(parts: Sequence[Atoms], sizes: Sequence[int], axis: int) -> Atoms:
    shape = np.broadcast_shapes(*(_with(part.shape, axis, 1) for part in parts))
    pairs = zip(parts, sizes, strict=True)
    return np.concatenate([np.broadcast_to(p, _with(shape, axis, size)) for p, size in pairs], axis)


def _with(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _added(label: Label, axis: int) -> Label:
    label = [_map(entry, lambda atoms: np.expand_dims(atoms, axis)) for entry in label]
    return [*label[:axis], None, *label[axis:]]


# --- lookups ----------------------------------------------------------------------------------


@rule("embedding")
def _embedding(call: Call) -> Label:
    table = call.label(call["weight"])
    call.freeze(table[0], "rows of a table, looked up by number")
    rank = call.output.dim()
    features = table[1]
    if isinstance(features, np.ndarray):
        features = features.reshape([1] * (rank - 1) + [-1]) if features.shape[0] == 1 else PLACED
    return [*call.label(call["indices"]), features]


@rule("index", "_unsafe_index", "index_select")
def _index(call: Call) -> Label | list[Label]:
    """Tensors of indices along neighbouring dimensions; the others stay as they are."""
    x, label = call.first, call.label(call.first)
    if "index_select" in call.name:
        indices: list[Any] = [None] * (call["dim"] % x.dim()) + [call["index"]]
    else:
        indices = list(call["indices"])
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if len(axes) != axes[-1] - axes[0] + 1 or any(indices[a].dtype == torch.bool for a in axes):
        return unknown(call)
    for axis in axes:
        label[axis] = call.freeze(label[axis], call.unknown)
        for entry in call.label(indices[axis]):
            call.freeze(entry, call.unknown)
    added = call.output.dim() - (x.dim() - len(axes))
    out: Label = []
    for axis, entry in enumerate(label):
        if isinstance(entry, np.ndarray):
            if depends(entry, axis, axes):
                entry = call.freeze(entry, call.unknown)
            else:
                shape = [size for a, size in enumerate(entry.shape) if a not in axes]
                entry = entry.reshape([*shape[: axes[0]], *[1] * added, *shape[axes[0] :]])
        out.append(entry)
    return [*out[: axes[0]], *[call.unknown] * added, *out[axes[-1] + 1 :]]
