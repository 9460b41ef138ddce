"""Swap the layers of a model for sparse ones where that is correct and faster."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from sparsekit import _native
from sparsekit.dispatch import table
from sparsekit.examples import run_examples
from sparsekit.gate import MIN_SPEEDUP, Verdict, VerdictCache
from sparsekit.nn import FusedActivation, SparseLinear, fusion
from sparsekit.pack import DTYPES, PackedWeight, checked_weight
from sparsekit.patterns import (
    MIN_DETECTED_SPARSITY,
    Pattern,
    PatternChoice,
    detect_pattern,
    require_match,
    resolve_pattern,
    select_modules,
)
from sparsekit.workload import LinearWorkload, kernel_for

Gate = Literal["measure", "always"]


@dataclass(frozen=True)
class ConvertRow:
    """What happened to one layer.

    Attributes:
        layer: dotted name.
        pattern: spelling of the pattern, or None when there is none.
        kernel: the sparse kernel for the largest m seen, or None.
        dense_ms: time of the fastest dense path for all calls of one forward pass, in
            milliseconds; None when it was not measured.
        sparse_ms: the same for the sparse kernel.
        speedup: dense time / sparse time.
        verdict: "sparse" or "dense".
        reason: why.
        activation: the activation fused into the layer, or None.
        m: rows of x seen in each call of the layer.
    """

    layer: str
    pattern: str | None
    kernel: str | None
    dense_ms: float | None
    sparse_ms: float | None
    speedup: float | None
    verdict: Literal["sparse", "dense"]
    reason: str
    activation: str | None = None
    m: tuple[int, ...] = ()


@dataclass(frozen=True)
class ConvertReport:
    """One row per layer looked at; `str()` is a table."""

    rows: list[ConvertRow]

    @property
    def sparse(self) -> list[str]:
        """Names of the layers that are sparse now."""
        return [row.layer for row in self.rows if row.verdict == "sparse"]

    def to_json(self) -> str:
        """The rows as a JSON array."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        head = ("layer", "pattern", "kernel", "dense ms", "sparse ms", "speed", "verdict", "reason")
        rows = [
            (
                row.layer,
                row.pattern or "-",
                row.kernel or "-",
                _figure(row.dense_ms, ".3f"),
                _figure(row.sparse_ms, ".3f"),
                _figure(row.speedup, ".2f") + ("" if row.speedup is None else "x"),
                row.verdict + (f" + {row.activation}" if row.activation else ""),
                row.reason,
            )
            for row in self.rows
        ]
        total = f"{len(self.sparse)} of {len(self.rows)} layers are sparse"
        return f"{table(head, rows)}\n{total}"


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def convert(
    model: nn.Module,
    pattern: PatternChoice | None = None,
    example_inputs: Any = None,
    gate: Gate = "measure",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    fuse: bool = True,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
) -> ConvertReport:
    """Replace each `nn.Linear` of a model, in place, by a `SparseLinear` where it wins.

    A layer stays dense, with the reason in the report, when somebody else reads its weight
    (`nn.MultiheadAttention`, the fused path of `nn.TransformerEncoderLayer`, tied embeddings, a
    parent that looks at `.weight`), when it is parametrised, quantised or not pruned, when it did
    not run, or when dense is as fast.

    Args:
        model: on a CPU or a GPU. Its modes (train, eval) are kept; the examples run in eval mode.
        pattern: None takes the pattern that each weight's zeros follow already (after
            `sparsekit.prune`, or pruned elsewhere). A pattern, or a mapping from globs and `re:`
            expressions to patterns, is applied to every layer it names; a weight that does not
            fit yet is pruned by magnitude.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments
            for the model, or a list of these. Needed to measure, and to fuse activations.
        gate: "measure" keeps a layer only if it is at least `sparsekit.gate.MIN_SPEEDUP` times as
            fast as the fastest dense path over the examples and not slower at any shape seen;
            "always" converts without measuring.
        targets: which layers, by globs or `re:` expressions; None means all.
        ignore: layers left alone; wins over `targets`.
        fuse: also fuse a ReLU, GELU or SiLU module into the layer before it where the parent's
            graph proves that nothing else reads the layer's output; the activation module becomes
            an identity (`sparsekit.nn.FusedActivation`).
        progress: show a progress bar.
        cache: file for the verdicts; None for the user's cache folder.

    Returns:
        The report, one row per `nn.Linear` chosen. Biases stay the parameters they were; weights
        are frozen from then on.

    Raises:
        ValueError: a bad argument, or a weight with NaN or infinity (the model is unchanged then).
    """
    if gate not in ("measure", "always"):
        raise ValueError(f"convert: gate must be 'measure' or 'always', got {gate!r}")
    if gate == "measure" and example_inputs is None:
        raise ValueError(
            "convert: gate='measure' needs example_inputs, to know which shapes to time; pass what "
            "the model is called with, or gate='always'"
        )
    layers = [
        _Layer(name, module)
        for name, module in select_modules(model, targets, ignore, (nn.Linear,))
        if isinstance(module, nn.Linear)
    ]
    if isinstance(pattern, Mapping):
        require_match(pattern, [layer.name for layer in layers], "convert: pattern")
    parents = _parents(model)
    _refuse_by_structure(model, layers, parents)
    for layer in layers:
        if not layer.reason:
            _choose_pattern(layer, pattern)
    plans: dict[int, fusion.Fusion] = {}
    if example_inputs is not None:
        open_layers = [layer for layer in layers if not layer.reason]
        if fuse:
            plans = fusion.find(model, [layer.module for layer in open_layers])
        _record(model, open_layers, plans, example_inputs)
    verdicts = VerdictCache(cache) if gate == "measure" else None
    rows = []
    bar = tqdm(layers, desc="convert", unit="layer", disable=not progress)
    for layer in bar:
        rows.append(_convert_layer(layer, plans.get(id(layer.module)), parents, verdicts))
    return ConvertReport(rows)


@dataclass
class _Layer:
    """A candidate on its way; `reason` set means it stays dense."""

    name: str
    module: nn.Linear
    reason: str = ""
    pattern: Pattern | None = None
    rows: Counter[int] = field(default_factory=Counter)


# --- reasons that need no run -----------------------------------------------------------------


def _parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For every module all its (parent, attribute) places; a shared module has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    return places


def _refuse_by_structure(
    model: nn.Module, layers: Sequence[_Layer], parents: Mapping[int, list[tuple[nn.Module, str]]]
) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_storage(parameter), set()).add(name)
    own: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own.setdefault(id(module), set()).add(f"{name}.weight")
    for layer in layers:
        linear = layer.module
        layer.reason = _parent_reason(parents.get(id(linear), [])) or _module_reason(linear)
        if not layer.reason:
            others = owners.get(_storage(linear.weight), set()) - own[id(linear)]
            if others:
                layer.reason = f"its weight is tied to {min(others)}"


def _storage(tensor: Tensor) -> int:
    # A meta or empty tensor has no address; its own identity then stands for it.
    address = tensor.untyped_storage().data_ptr() if type(tensor.data) is Tensor else 0
    return address or id(tensor)


def _parent_reason(places: Sequence[tuple[nn.Module, str]]) -> str:
    if not places:
        return "it is the model itself; use SparseLinear.from_dense"
    for parent, attribute in places:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight (and in_proj_weight) directly"
        if isinstance(parent, nn.TransformerEncoderLayer) and attribute in ("linear1", "linear2"):
            return "the fused path of nn.TransformerEncoderLayer reads its weight directly"
    return ""


def _module_reason(module: nn.Linear) -> str:
    if parametrize.is_parametrized(module):
        return "it is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    if type(module) is not nn.Linear:
        kind = type(module)
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a plain nn.Linear"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (torch.nn.utils.prune, weight_norm); make it permanent first"
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"it is quantised already ({type(weight.data).__name__}, {weight.dtype})"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; there are kernels for float32, bfloat16, float16"
    if weight.device.type not in ("cpu", "cuda"):
        return f"it is on {weight.device}; there are kernels for CPUs and for CUDA"
    if weight.device.type == "cuda" and (missing := _native.cuda_unavailable_reason()):
        return f"it is on {weight.device}; {missing}"
    if weight.numel() == 0:
        return "its weight is empty"
    if module.bias is not None and module.bias.dtype != weight.dtype:
        return f"its bias is {module.bias.dtype}, its weight {weight.dtype}"
    if "forward" in module.__dict__:
        return "its forward method was replaced"
    if fusion.has_hooks(module):
        return "it has hooks, which would be lost"
    return ""


def _choose_pattern(layer: _Layer, pattern: PatternChoice | None) -> None:
    weight = checked_weight(f"convert: layer {layer.name!r}", layer.module.weight)
    if pattern is not None:
        layer.pattern = resolve_pattern(layer.name, pattern)
        if layer.pattern is None:
            layer.reason = "no pattern was given for it"
        return
    layer.pattern = detect_pattern(weight)
    if layer.pattern is None:
        zeros = 1.0 - weight.count_nonzero().item() / weight.numel()
        layer.reason = (
            f"it is not pruned ({zeros:.0%} zeros)"
            if zeros < MIN_DETECTED_SPARSITY
            else f"its zeros ({zeros:.0%}) follow no pattern"
        )


# --- what the examples show -------------------------------------------------------------------


def _record(
    model: nn.Module,
    layers: Sequence[_Layer],
    plans: dict[int, fusion.Fusion],
    example_inputs: Any,
) -> None:
    """Run the examples once; note the shapes, who reads weights, and which fusions hold."""
    by_module = {id(layer.module): layer for layer in layers}
    readers: set[int] = set()

    class Watched(nn.Linear):
        """Stands in for nn.Linear: sees each call, and each look at the weight from outside."""

        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            readers.add(id(self))
            return self._parameters["weight"]  # type: ignore[return-value]

        def forward(self, input: Tensor) -> Tensor:
            by_module[id(self)].rows[input.numel() // max(1, self.in_features)] += 1
            return nn.functional.linear(input, self._parameters["weight"], self.bias)  # type: ignore[arg-type]

    calls: Counter[int] = Counter()
    counted = {id(part): part for plan in plans.values() for part in (plan.parent, plan.module)}
    handles = [
        module.register_forward_pre_hook(lambda module, _: calls.update((id(module),)))
        for module in counted.values()
    ]
    try:
        for layer in layers:
            layer.module.__class__ = Watched
        run_examples(model, example_inputs)
    finally:
        for layer in layers:
            layer.module.__class__ = nn.Linear
        for handle in handles:
            handle.remove()
    for layer in layers:
        if id(layer.module) in readers:
            layer.reason = "another module reads its weight directly"
        elif not layer.rows:
            layer.reason = "it did not run on the example inputs"
    for key, plan in list(plans.items()):
        # The parent's graph is the whole truth only if nobody calls its parts by themselves.
        own = by_module[key].rows.total()
        if not own == calls[id(plan.parent)] == calls[id(plan.module)]:
            del plans[key]


# --- the swap ---------------------------------------------------------------------------------


def _convert_layer(
    layer: _Layer,
    plan: fusion.Fusion | None,
    parents: Mapping[int, list[tuple[nn.Module, str]]],
    verdicts: VerdictCache | None,
) -> ConvertRow:
    if layer.reason or layer.pattern is None:
        return _row(layer, layer.reason)
    dense = layer.module
    pruned_here = not layer.pattern.fits(dense.weight.detach() != 0)
    activation = plan.activation if plan else None
    note = "pruned by magnitude; " if pruned_here else ""
    try:
        sparse = SparseLinear.from_dense(dense, layer.pattern, activation=activation)
        judged = _judge(layer, sparse.packed, dense.bias, activation, verdicts)
    except NotImplementedError as error:
        return _row(layer, str(error))
    if judged.lost:
        return _row(layer, judged.reason, judged)
    sparse.bias = dense.bias  # the parameter itself, whoever else holds it
    for parent, attribute in parents[id(dense)]:
        setattr(parent, attribute, sparse)
    if plan:
        fused = FusedActivation(plan.activation).train(plan.module.training)
        setattr(plan.parent, plan.attribute, fused)
    return _row(layer, note + judged.reason, judged, activation)


@dataclass(frozen=True)
class _Judgement:
    kernel: str
    dense_ms: float | None
    sparse_ms: float | None
    speedup: float | None
    lost: bool
    reason: str


def _judge(
    layer: _Layer,
    packed: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    verdicts: VerdictCache | None,
) -> _Judgement:
    seen = {m: count for m, count in layer.rows.items() if m > 0}
    kernel = kernel_for(packed, max(seen, default=1))
    if verdicts is None:
        return _Judgement(kernel, None, None, None, False, "not measured (gate='always')")
    if not seen:
        return _Judgement(kernel, None, None, None, True, "it ran on empty inputs only")
    bias = None if bias is None else bias.detach()
    timed = {m: verdicts.judge(LinearWorkload(packed, m, bias, activation)) for m in seen}
    dense_ms = sum(timed[m].dense_ms * count for m, count in seen.items())
    sparse_ms = sum(timed[m].sparse_ms * count for m, count in seen.items())
    # Where there is one shape, the paired ratio is steadier than the ratio of two medians.
    paired = next(iter(timed.values())).speedup
    speedup = paired if len(timed) == 1 else dense_ms / sparse_ms
    reason, lost = _verdict_reason(timed, speedup)
    return _Judgement(kernel, dense_ms, sparse_ms, speedup, lost, reason)


def _verdict_reason(timed: Mapping[int, Verdict], speedup: float) -> tuple[str, bool]:
    for verdict in timed.values():
        if verdict.fault:
            return verdict.fault, True
    paths = "/".join(sorted({verdict.dense_path for verdict in timed.values()}))
    if speedup < MIN_SPEEDUP:
        return f"{speedup:.2f}x of dense ({paths}), less than {MIN_SPEEDUP}x", True
    slowest = min(timed, key=lambda m: timed[m].speedup)
    if timed[slowest].speedup < 1.0:
        return f"slower than dense at m={slowest} ({timed[slowest].speedup:.2f}x)", True
    return f"{speedup:.2f}x of dense ({paths})", False


def _row(
    layer: _Layer,
    reason: str,
    judged: _Judgement | None = None,
    activation: str | None = None,
) -> ConvertRow:
    return ConvertRow(
        layer=layer.name,
        pattern=None if layer.pattern is None else str(layer.pattern),
        kernel=judged.kernel if judged else None,
        dense_ms=judged.dense_ms if judged else None,
        sparse_ms=judged.sparse_ms if judged else None,
        speedup=judged.speedup if judged else None,
        verdict="sparse" if judged and not judged.lost else "dense",
        reason=reason,
        activation=activation,
        m=tuple(layer.rows.elements()),
    )
