"""The layers `convert` looks at, and the reasons to leave one dense that need no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparsekit import _native
from sparsekit.filters import FilterShape, to_tiles
from sparsekit.nn import fusion
from sparsekit.pack import DTYPES, checked_weight, detect, mask
from sparsekit.patterns import (
    MIN_DETECTED_SPARSITY,
    Pattern,
    PatternChoice,
    resolve_pattern,
    select_modules,
)

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)

# Of an x whose first dimension counts examples: what a batch normalisation takes.
_BATCHED_DIMS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4}


@dataclass(frozen=True)
class Call:
    """What a layer was called with.

    Attributes:
        shape: of x; where a convolution pads with anything but zeros, of the padded x.
        m: rows of x; of a convolution, output pixels.
        dims: of the convolution; 0 for a linear layer.
        channels_last: whether the channels of a pixel lie side by side.
    """

    shape: tuple[int, ...]
    m: int
    dims: int = 0
    channels_last: bool = True

    @property
    def layout(self) -> str:
        """Of a convolution: "NHWC", "NCHW" or what corresponds to these."""
        sizes = "L" if self.dims == 1 else "HW"
        batch = "N" if len(self.shape) == self.dims + 2 else ""
        return f"{batch}{sizes}C" if self.channels_last else f"{batch}C{sizes}"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout}" if self.dims else f"m={self.m}"


@dataclass
class Candidate:
    """A layer on its way; `reason` set means it stays dense.

    Attributes:
        name: dotted.
        module: the dense layer.
        places: (parent, attribute) for each place it is at.
        reason: why it stays dense.
        fixed: its weight may not be touched at all, not even to fold a batch normalisation into it.
        bias_tied_to: who else holds its bias.
        pattern: what its weight follows or is pruned to.
        mask: what to keep of a weight that does not fit the pattern yet.
        calls: what the examples showed.
        activation: what was found to follow it, fused if it becomes sparse.
        folded: a batch normalisation was folded into it.
        notes: for the report, beside the reason.
    """

    name: str
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    places: Sequence[tuple[nn.Module, str]]
    reason: str = ""
    fixed: bool = False
    bias_tied_to: str = ""
    pattern: Pattern | None = None
    mask: Tensor | None = None
    calls: Counter[Call] = field(default_factory=Counter)
    activation: fusion.Place | None = None
    folded: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return not isinstance(self.module, nn.Linear)

    @property
    def is_batched(self) -> bool:
        """Whether the examples always had a first dimension that counts examples, and no other."""
        return all(len(call.shape) == _BATCHED_DIMS[type(self.module)] for call in self.calls)


def find_candidates(
    model: nn.Module, targets: str | Sequence[str] | None, ignore: str | Sequence[str] | None
) -> list[Candidate]:
    """The chosen layers, with reasons for those that their place or kind refuses.

    Raises:
        ValueError: an expression in `targets` matches no layer.
    """
    holders = parents(model)
    candidates = [
        Candidate(name, module, holders.get(id(module), []))
        for name, module in select_modules(model, targets, ignore, KINDS)
        if isinstance(module, KINDS)
    ]
    refuse_by_structure(model, candidates)
    return candidates


def parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For every module all its (parent, attribute) places; a shared module has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    return places


def refuse_by_structure(model: nn.Module, candidates: Sequence[Candidate]) -> None:
    """Give those a reason whose weight nobody may touch, or whose kind has no sparse kernel."""
    owners: dict[int, set[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_storage(tensor), set()).add(name)
    own: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own.setdefault(id(module), set()).update((f"{name}.weight", f"{name}.bias"))
    for candidate in candidates:
        layer = candidate.module
        reason = _parent_reason(candidate) or _module_reason(layer)
        if not reason:
            others = owners.get(_storage(layer.weight), set()) - own[id(layer)]
            reason = f"its weight is tied to {min(others)}" if others else ""
        candidate.fixed = bool(reason)
        candidate.reason = reason or _kind_reason(layer)
        if layer.bias is not None:
            others = owners.get(_storage(layer.bias), set()) - own[id(layer)]
            candidate.bias_tied_to = min(others, default="")


def _storage(tensor: Tensor) -> int:
    # A meta or empty tensor has no address; its own identity then stands for it.
    if is_lazy(tensor) or type(tensor.data) is not Tensor:
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _parent_reason(candidate: Candidate) -> str:
    if not candidate.places:
        kind = type(candidate.module).__name__
        return f"it is the model itself; use Sparse{kind}.from_dense"
    for parent, attribute in candidate.places:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight (and in_proj_weight) directly"
        if isinstance(parent, nn.TransformerEncoderLayer) and attribute in ("linear1", "linear2"):
            return "the fused path of nn.TransformerEncoderLayer reads its weight directly"
    return ""


def _module_reason(module: nn.Linear | nn.Conv1d | nn.Conv2d) -> str:
    if parametrize.is_parametrized(module):
        return "it is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    kind: Any = type(module)
    weight: Any = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        return f"it is an nn.{kind.__name__} that has not run yet; run the model once first"
    plain = next(base for base in KINDS if isinstance(module, base))
    if kind is not plain:
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"it is a {name}, not a plain nn.{plain.__name__}"
    if weight is None:
        return "its weight is computed (torch.nn.utils.prune, weight_norm); make it permanent first"
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"it is quantised already ({type(weight.data).__name__}, {weight.dtype})"
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device}; there are kernels for CPUs and for CUDA"
    if weight.numel() == 0:
        return "its weight is empty"
    if module.bias is not None and module.bias.dtype != weight.dtype:
        return f"its bias is {module.bias.dtype}, its weight {weight.dtype}"
    if "forward" in module.__dict__:
        return "its forward method was replaced"
    if fusion.has_hooks(module):
        return "it has hooks, which would be lost"
    return ""


def _kind_reason(module: nn.Linear | nn.Conv1d | nn.Conv2d) -> str:
    """Why there is no sparse layer for a weight that may be touched otherwise."""
    weight = module.weight
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; there are kernels for float32, bfloat16, float16"
    if weight.device.type == "cuda" and (missing := _native.cuda_unavailable_reason()):
        return f"it is on {weight.device}; {missing}"
    if not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1:
        return "it is depthwise (groups == in_channels): stays dense"
    return ""


def choose_pattern(candidate: Candidate, pattern: PatternChoice | None) -> None:
    """The pattern that was asked for, or the one that the zeros follow; a reason if there is none.

    Raises:
        ValueError: the weight holds a NaN or an infinity.
    """
    dense = candidate.module
    what = f"convert: layer {candidate.name!r}"
    weight = checked_weight(what, dense.weight, (dense.weight.dim(),))
    found = detect(weight) if pattern is None else resolve_pattern(candidate.name, pattern)
    if found is None and pattern is not None:
        candidate.reason = "no pattern was given for it"
    elif found is None:
        zeros = 1.0 - weight.count_nonzero().item() / weight.numel()
        candidate.reason = (
            f"it is not pruned ({zeros:.0%} zeros)"
            if zeros < MIN_DETECTED_SPARSITY
            else f"its zeros ({zeros:.0%}) follow no pattern"
        )
    else:
        candidate.pattern = found
        matrix = weight
        if not isinstance(dense, nn.Linear):
            try:
                FilterShape.of(weight, dense.groups).matrix_shape(found)
            except ValueError as error:
                candidate.reason = str(error)
                return
            matrix = to_tiles(weight, found)
        if not found.fits(matrix != 0):
            # Now: batch normalisations that are folded later do not change the choice.
            candidate.mask = mask(weight, found)
