"""How operations carry the channels of their inputs to their outputs.

A *label* says, for each dimension of a tensor, what is known about its order:

- atoms, an int64 array with as many dimensions as the tensor: which channel stands where. Its size
  is 1 along dimensions it does not depend on; the features of a head depend on the head as well.
- a string: the order is given, and this is why.
- None: the tensor is the same all along the dimension, so any order will do.

A rule reads the labels of an operation's inputs, tells the `Ledger` what the operation asks for,
and returns the labels of its outputs. An operation without a rule freezes what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import Tensor

from sparsekit.prune.permutation.freedom import Atoms, Ledger

Entry: TypeAlias = Atoms | str | None
Label: TypeAlias = list[Entry]
Labels: TypeAlias = Callable[[Tensor], Label]


MADE = "a tensor made on the way comes in an order of its own"


class Call:
    """One call of an operation: its arguments by name, their labels, and what it returned."""

    def __init__(
        self, name: str, arguments: Mapping[str, Any], ledger: Ledger, labels: Labels
    ) -> None:
        self.name, self.arguments, self.ledger = name, arguments, ledger
        # Before the call, which may change the first argument in place.
        self._labels = {id(one): labels(one) for one in self.tensors}
        if isinstance(self.first, Tensor):
            self.shape, self.strides = self.first.shape, self.first.stride()
        self.output: Any = None

    def label(self, tensor: Tensor) -> Label:
        """The label of an argument; the caller may change the list."""
        return list(self._labels[id(tensor)])

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, *names: str) -> Any:
        """The first of the names that the operation has; None where it has none."""
        return next((self.arguments[name] for name in names if name in self.arguments), None)

    @property
    def first(self) -> Any:
        """The first argument, whatever its name."""
        return next(iter(self.arguments.values()))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        out: list[Tensor] = []
        for value in self.arguments.values():
            several = value if isinstance(value, list | tuple) else [value]
            out += [one for one in several if isinstance(one, Tensor)]
        return out

    def freeze(self, entry: Entry, reason: str) -> str:
        if isinstance(entry, np.ndarray):
            self.ledger.freeze(entry, reason)
            return reason
        return reason if entry is None else entry

    @property
    def unknown(self) -> str:
        return f"{self.name} needs them in their order, or is not understood"

    def combine(self, operands: Sequence[tuple[Label, str]], out: str) -> Label:
        """Labels of a product of tensors, in the notation of einsum.

        Dimensions of one letter run together, so that they have one order. A letter that `out`
        lacks is summed over.
        """
        letters = "".join(dict.fromkeys("".join(names for _, names in operands) + out))
        merged: dict[str, Entry] = {}
        for letter in letters:
            entries = [
                _spread(label[names.index(letter)], names, letters)
                for label, names in operands
                if letter in names
            ]
            merged[letter] = self.meet(entries)
        kept = [letters.index(letter) for letter in out]
        summed = [axis for axis in range(len(letters)) if axis not in kept]
        result: Label = []
        for letter in out:
            entry = merged[letter]
            if isinstance(entry, np.ndarray):
                entry = self.collapse(entry, summed).transpose(kept + summed)
                entry = entry.reshape(entry.shape[: len(kept)])
            result.append(entry)
        return result

    def meet(self, entries: Sequence[Entry]) -> Entry:
        atoms = [entry for entry in entries if isinstance(entry, np.ndarray)]
        given = next((entry for entry in entries if isinstance(entry, str)), None)
        if given is not None:
            for entry in atoms:
                self.ledger.freeze(entry, given)
            return given
        for entry in atoms[1:]:
            self.ledger.same(atoms[0], entry)
        return atoms[0] if atoms else None

    def cut(self, atoms: Atoms, axis: int, part: Atoms) -> None:
        """The dimension consists of these parts."""
        self.ledger.part(np.moveaxis(atoms, axis, -1), part)

    def collapse(self, atoms: Atoms, axes: Sequence[int]) -> Atoms:
        """Atoms that no longer depend on some dimensions: those are summed over."""
        for axis in axes:
            if atoms.shape[axis] > 1:
                first = atoms.take([0], axis)
                self.ledger.same(np.broadcast_to(first, atoms.shape), atoms)
                atoms = first
        return atoms


def _spread(entry: Entry, names: str, letters: str) -> Entry:
    """The entry as one of a tensor with a dimension for each letter."""
    if not isinstance(entry, np.ndarray):
        return entry
    order = sorted(range(len(names)), key=lambda axis: letters.index(names[axis]))
    shape = [entry.shape[names.index(letter)] if letter in names else 1 for letter in letters]
    return entry.transpose(order).reshape(shape)


Rule: TypeAlias = Callable[[Call], "Label | list[Label]"]
AnyRule = TypeVar("AnyRule", bound=Rule)
RULES: dict[str, Rule] = {}
"""Rules by the operation's name without namespace and overload; in-place variants included."""


def rule(*names: str) -> Callable[[AnyRule], AnyRule]:
    """Makes a function the rule of some operations."""

    def register(function: AnyRule) -> AnyRule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unknown(call: Call) -> list[Label]:
    """Freezes whatever the operation reads."""
    for tensor in call.tensors:
        for entry in call.label(tensor):
            call.freeze(entry, call.unknown)
    reason = call.unknown if call.tensors else MADE
    return [[reason] * out.dim() for out in outputs(call.output)]


def outputs(output: Any) -> list[Tensor]:
    several = output if isinstance(output, list | tuple) else [output]
    return [one for one in several if isinstance(one, Tensor)]


def letters_of(count: int, start: str = "A") -> str:
    return "".join(chr(ord(start) + index) for index in range(count))


# --- element by element -----------------------------------------------------------------------


def pointwise(call: Call) -> Label:
    """Operands are aligned at their last dimension."""
    rank = max(tensor.dim() for tensor in (*call.tensors, *outputs(call.output)))
    names = letters_of(rank)
    operands = [(call.label(one), names[rank - one.dim() :]) for one in call.tensors]
    return call.combine(operands, names)


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "copy_", "fill_", "zero_")
@rule("native_dropout", "dropout", "view_as_real_copy")
def _like_pointwise(call: Call) -> Label:
    return pointwise(call)


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def _norm_of_features(call: Call) -> list[Label]:
    return _with_rest(call, pointwise(call))


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@rule("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "batch_norm")
@rule("_batch_norm_no_update")
def _norm_of_channels(call: Call) -> list[Label]:
    names = letters_of(call.first.dim())
    operands = [(call.label(one), names if one is call.first else "B") for one in call.tensors]
    return _with_rest(call, call.combine(operands, names))


@rule("native_group_norm", "group_norm")
def _group_norm(call: Call) -> list[Label]:
    x, label = call.first, call.label(call.first)
    channels, groups = x.shape[1], call.get("group", "num_groups")
    names = letters_of(x.dim())
    operands = [(label, names)]
    operands += [(call.label(one), "B") for one in call.tensors if one is not x]
    label = call.combine(operands, names)
    if isinstance(label[1], np.ndarray) and 1 < groups < channels:
        call.cut(label[1], 1, np.repeat(np.arange(groups), channels // groups))
    return _with_rest(call, label)


def _with_rest(call: Call, label: Label) -> list[Label]:
    """The result, and what belongs to the backward pass alone."""
    backward: list[Label] = [[call.unknown] * one.dim() for one in outputs(call.output)[1:]]
    return [label, *backward]


# --- sums over a dimension --------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp")
@rule("any", "all", "prod", "nansum", "nanmean")
def _reduce(call: Call) -> Label:
    x, dims = call.first, call.get("dim")
    if dims is None or dims == []:
        dims = list(range(x.dim()))
    axes = {axis % x.dim() for axis in ([dims] if isinstance(dims, int) else dims)}
    out = outputs(call.output)[0]
    label: Label = []
    for axis, entry in enumerate(call.label(x)):
        if axis in axes:
            entry = None
        elif isinstance(entry, np.ndarray):
            entry = call.collapse(entry, sorted(axes))
        label.append(entry)
    if out.dim() == x.dim():
        return label
    return drop(label, axes)


@rule("argmax", "argmin", "cumsum", "cumprod", "sort", "topk", "argsort", "flip", "roll")
@rule("max", "min", "median", "kthvalue", "mode", "logcumsumexp")
def _along(call: Call) -> list[Label]:
    """Needs the order along some dimensions, and does the others one by one."""
    x = call.first
    dims = call.get("dim", "dims")
    axes = [dims] if isinstance(dims, int) else dims
    if len(call.tensors) > 1 or axes is None:
        return unknown(call)
    axes = {axis % max(x.dim(), 1) for axis in axes} or set(range(x.dim()))
    label: Label = []
    for axis, entry in enumerate(call.label(x)):
        touched = isinstance(entry, np.ndarray) and depends(entry, axis, axes)
        label.append(call.freeze(entry, call.unknown) if axis in axes or touched else entry)
    out = outputs(call.output)
    return [label if one.dim() == x.dim() else drop(label, axes) for one in out]


# --- products ---------------------------------------------------------------------------------


@rule("mm")
def _mm(call: Call) -> Label:
    return _product(call, "self", "nk", "mat2", "km", "nm")


@rule("bmm")
def _bmm(call: Call) -> Label:
    return _product(call, "self", "bnk", "mat2", "bkm", "bnm")


@rule("mv")
def _mv(call: Call) -> Label:
    return _product(call, "self", "nk", "vec", "k", "n")


@rule("dot")
def _dot(call: Call) -> Label:
    return _product(call, "self", "k", "tensor", "k", "")


@rule("addmm", "addmm_")
def _addmm(call: Call) -> Label:
    return _with_bias(call, _product(call, "mat1", "nk", "mat2", "km", "nm"), call["self"])


@rule("baddbmm", "baddbmm_")
def _baddbmm(call: Call) -> Label:
    return _with_bias(call, _product(call, "batch1", "bnk", "batch2", "bkm", "bnm"), call["self"])


@rule("linear")
def _linear(call: Call) -> Label:
    leading = letters_of(call["input"].dim() - 1)
    weight = "ok" if call["weight"].dim() == 2 else "k"
    product = _product(call, "input", leading + "k", "weight", weight, leading + weight[:-1])
    return product if call["bias"] is None else _with_bias(call, product, call["bias"])


def _product(call: Call, one: str, names: str, other: str, its: str, out: str) -> Label:
    return call.combine([(call.label(call[one]), names), (call.label(call[other]), its)], out)


def _with_bias(call: Call, label: Label, bias: Tensor) -> Label:
    names = letters_of(len(label))
    added = (call.label(bias), names[len(label) - bias.dim() :])
    return call.combine([(label, names), added], names)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "cudnn_convolution")
def _convolution(call: Call) -> Label:
    x, weight, bias = call.get("input", "self"), call["weight"], call.get("bias")
    transposed = bool(call.get("transposed")) or "transpose" in call.name
    groups = call["groups"]
    label, kernel = call.label(x), call.label(weight)
    lead = x.dim() - weight.dim() + 2  # an image may come without a batch
    pixels = range(lead, x.dim())
    for axis in pixels:
        label[axis] = call.freeze(label[axis], call.unknown)
    kernel[2:] = [call.freeze(entry, "a tap of a filter") for entry in kernel[2:]]
    label = _flat(call, label, pixels)
    kernel = _flat(call, kernel, range(2, weight.dim()))
    batch = "n" * (lead - 1)
    taps, pixel_names = letters_of(weight.dim() - 2, "P"), letters_of(len(pixels), "G")
    image = (label, batch + "c" + pixel_names)
    if groups == 1:
        names = ("co" if transposed else "oc") + taps
        out = call.combine([image, (kernel, names)], batch + "o" + pixel_names)
    elif groups == x.shape[lead - 1] == weight.shape[0] and weight.shape[1] == 1:
        out = call.combine([image, (kernel, "ci" + taps)], batch + "c" + pixel_names)
    else:
        reason = f"a convolution of {groups} groups reads them group by group"
        label[lead - 1] = call.freeze(label[lead - 1], reason)
        kernel[1] = call.freeze(kernel[1], reason)
        if transposed:
            kernel[0] = call.freeze(kernel[0], reason)
        filters = kernel[0]
        if isinstance(filters, np.ndarray):
            call.cut(filters, 0, np.repeat(np.arange(groups), len(filters) // groups))
            filters = filters.reshape([1] * (lead - 1) + [-1] + [1] * len(pixels))
        out = [*label[: lead - 1], kernel[0] if transposed else filters, *label[lead:]]
        if transposed:
            out[lead - 1] = reason
    if bias is not None:
        names = letters_of(len(out))
        out = call.combine([(out, names), (call.label(bias), names[lead - 1])], names)
    return [call.unknown if axis in pixels else entry for axis, entry in enumerate(out)]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable")
@rule("_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps")
def _attention(call: Call) -> list[Label]:
    query, keys, values = (call[name] for name in ("query", "key", "value"))
    if query.dim() != 4:
        return unknown(call)
    labels = [call.label(one) for one in (query, keys, values)]
    for label in labels:  # a mask may tell heads and tokens apart
        label[1:3] = [call.freeze(entry, call.unknown) for entry in label[1:3]]
    for index, one in ((1, keys), (2, values)):
        shared = query.shape[1] // one.shape[1]  # query heads that read one head of these
        labels[index] = [_repeated(call, entry, 1, shared) for entry in labels[index]]
    mask = call.get("attn_mask", "attn_bias")
    for entry in [] if mask is None else call.label(mask):
        call.freeze(entry, call.unknown)
    operands = list(zip(labels, ("bhtd", "bhsd", "bhse"), strict=True))
    return _with_rest(call, call.combine(operands, "bhte"))


def _repeated(call: Call, entry: Entry, axis: int, times: int) -> Entry:
    """Each index along a dimension `times` times."""
    if times == 1 or not isinstance(entry, np.ndarray) or entry.shape[axis] == 1:
        return entry
    return entry.repeat(times, axis)


# --- pixels -----------------------------------------------------------------------------------


@rule("max_pool1d", "max_pool2d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d")
@rule("_adaptive_avg_pool2d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "adaptive_avg_pool2d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
@rule("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
@rule("upsample_linear1d", "mkldnn_max_pool2d", "mkldnn_adaptive_avg_pool2d")
@rule("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pixels(call: Call) -> list[Label]:
    """Works on the last dimension or the last two, for each channel alone."""
    x = call.first
    count = 1 if "1d" in call.name else 2
    label = _flat(call, call.label(x), range(x.dim() - count, x.dim()))
    for axis in range(x.dim() - count, x.dim()):
        label[axis] = call.freeze(label[axis], call.unknown)
    return [label for _ in outputs(call.output)]


@rule("constant_pad_nd", "pad")
def _pad(call: Call) -> Label:
    x, amounts = call.first, list(call["pad"])
    label = call.label(x)
    for index in range(len(amounts) // 2):
        axis = x.dim() - 1 - index
        if amounts[2 * index] or amounts[2 * index + 1]:
            label[axis] = call.freeze(label[axis], call.unknown)
            label = _flat(call, label, [axis])
    return label


def drop(label: Label, axes: Iterable[int]) -> Label:
    """Without dimensions that have the size 1 by now."""
    gone = tuple(axes)
    return [
        entry.squeeze(gone) if isinstance(entry, np.ndarray) else entry
        for axis, entry in enumerate(label)
        if axis not in gone
    ]


def _flat(call: Call, label: Label, axes: Iterable[int]) -> Label:
    """Freezes what depends on dimensions that are about to change."""
    return [
        call.freeze(entry, call.unknown)
        if isinstance(entry, np.ndarray) and depends(entry, index, axes)
        else entry
        for index, entry in enumerate(label)
    ]


def depends(atoms: Atoms, own: int, axes: Iterable[int]) -> bool:
    return any(atoms.shape[axis] > 1 for axis in axes if axis != own)
