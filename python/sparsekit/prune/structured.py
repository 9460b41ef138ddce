"""Structured pruning: whole channels, filters and attention heads are cut out of the model.

What is left is an ordinary, smaller dense model, which `prune` then makes sparse: both gains
multiply. Which layers must be cut together is found by the dependency graph of torch-pruning
(Fang et al. 2023, "DepGraph", arXiv 2301.12900), which also does the cutting; what a channel is
worth is the sum of this package's scores over every weight that goes with it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from sparsekit.patterns import BlockSparse, Pattern, match, require_match
from sparsekit.prune.calibration import CACHE_BYTES, Batch, Calibration, Loss, read_batches
from sparsekit.prune.layers import PRUNABLE, Layer
from sparsekit.prune.methods import METHODS, Method
from sparsekit.prune.modes import eval_mode
from sparsekit.prune.moments import ReconstructionOptions, known_columns
from sparsekit.prune.report import as_text
from sparsekit.prune.scores import Columns, Unpruned, with_statistic

# Attributes in which attention modules keep the number of their heads, and the length of all.
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_HEAD_LENGTHS = ("all_head_size", "embed_dim", "inner_dim")
# Parts of the names of autograd nodes in which activations are multiplied with each other.
_PRODUCTS = ("bmm", "scaleddotproduct", "softmax")
# Modules whose channels are tied to each other in ways that need more than a list of indices.
_TIED = (nn.GroupNorm, nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN)


@dataclass(frozen=True)
class PrunedGroup:
    """Layers whose channels go together.

    Attributes:
        layers: modules that put these channels out, the first one names the group.
        readers: modules that read them.
        before: channels there were.
        kept: indices of those that stayed.
        heads: attention heads (before, after), None where there are none.
        reason: why nothing was cut.
    """

    layers: tuple[str, ...]
    readers: tuple[str, ...]
    before: int
    kept: tuple[int, ...]
    heads: tuple[int, int] | None = None
    reason: str = ""

    @property
    def after(self) -> int:
        """Channels there are."""
        return len(self.kept)


@dataclass(frozen=True)
class StructuredReport:
    """Result of `prune_structured`. `print(report)` shows a table, one line per group.

    Attributes:
        method: name of the method.
        groups: all of them, cut or not.
        parameters: of the whole model (before, after).
        seconds: wall time.
    """

    method: str
    groups: tuple[PrunedGroup, ...]
    parameters: tuple[int, int]
    seconds: float

    @property
    def sparsity(self) -> float:
        """Fraction of the model's parameters that is gone."""
        before, after = self.parameters
        return 1.0 - after / before

    def __rich__(self) -> RenderableType:
        table = Table()
        for heading in ("channels of", "read by"):
            table.add_column(heading, overflow="fold")
        for heading in ("before", "after", "heads"):
            table.add_column(heading, justify="right")
        table.add_column("note", overflow="fold")
        for group in self.groups:
            heads = "" if group.heads is None else f"{group.heads[0]} -> {group.heads[1]}"
            names = [_few(part) for part in (group.layers, group.readers)]
            table.add_row(*names, str(group.before), str(group.after), heads, group.reason)
        cut = sum(group.after < group.before for group in self.groups)
        before, after = self.parameters
        summary = (
            f"{self.method}: {cut} of {len(self.groups)} groups cut, {before:,} -> {after:,} "
            f"parameters ({self.sparsity:.1%} fewer), {self.seconds:.1f} s"
        )
        return Lines(summary, table)

    def __str__(self) -> str:
        return as_text(self, width=120)


def prune_structured(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    round_to: int = 16,
    heads: Mapping[str, int] | None = None,
    seed: int = 0,
) -> StructuredReport:
    """Cut the least important channels and attention heads out of a model, in place.

    Channels that are added, normalised or concatenated together are cut together. A channel is
    worth the sum of the method's scores over the weights that make it and those that read it.
    Every group loses the same share. Attention loses whole heads.

    What stays: the model's outputs; channels of grouped convolutions, group norms, recurrent
    layers and `nn.MultiheadAttention`; channels of embeddings and free parameters (the width of a
    transformer), unless `targets` names a layer that puts them out. The report says which and why.

    Needs what the method needs: "magnitude" nothing, "wanda" calibration, "taylor" or "fisher"
    calibration and a loss. Costs a forward, and the method's scores; train the model afterwards,
    with `distill(model, dense, batches, {}, train="*")` for instance, and prune what is left.

    Args:
        model: changed in place: its layers get smaller weights. As before if anything fails.
        example_inputs: one batch to trace the model with: a tensor, a tuple or list of positional
            arguments or a mapping of keyword arguments.
        sparsity: share of the channels to cut, above 0 and below 1; less where `round_to` asks.
        method: a name in `METHODS`.
        calibration: batches as for `prune`.
        loss: `(model, batch) -> scalar` as for `prune`.
        targets: globs or `re:` expressions of layers whose output channels may be cut, with those
            of every layer they are tied to; None means all.
        ignore: layers whose output channels stay; wins over `targets`.
        round_to: what is left is a multiple of it, which is what kernels and patterns like.
        heads: glob or `re:` expression of query, key and value layers -> number of heads; needed
            only where the module around them does not say.
        seed: for the method "random".

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: sparsity or round_to out of range, unknown method, calibration or a loss
            missing where it is needed, nothing to cut, heads that do not divide a layer, a model
            that the graph cannot follow.
    """
    started = time.perf_counter()
    graphs = _library()
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"prune_structured: sparsity must be above 0 and below 1, got {sparsity}")
    if round_to < 1:
        raise ValueError(f"prune_structured: round_to must be at least 1, got {round_to}")
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ValueError(f"prune_structured: unknown method {method!r}; known are {known}")
    chosen = METHODS[method]
    if chosen.needs_calibration and calibration is None:
        raise ValueError(
            f"prune_structured: method {method!r} needs calibration data; pass "
            "calibration=batches, or use method='magnitude'"
        )
    batches = None if calibration is None else read_batches(calibration, loss=loss)
    (example,) = read_batches([example_inputs], "example_inputs")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with _restored_on_failure(model):
        with warnings.catch_warnings():
            # The library's own, about parameters and operations that are handled below.
            warnings.simplefilter("ignore")
            found = _Groups(graphs, model, example)
            picked = found.pick(sparsity, round_to, _Choice(targets, ignore, heads or {}))
        scores = _weight_scores(model, chosen, batches, sparsity, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = tuple(group.cut(scores) for group in picked)
        found.check(example)
    after = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - started
    return StructuredReport(method, report, (parameters, after), seconds)


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ImportError(
            "prune_structured: needs torch-pruning, which this Python does not have; run "
            'pip install "sparsekit-kernels[prune]"'
        ) from None
    return torch_pruning


# --- what a channel is worth ----------------------------------------------------------------------


def _weight_scores(
    model: nn.Module,
    method: Method,
    batches: Sequence[Batch] | None,
    sparsity: float,
    seed: int,
) -> dict[nn.Module, Tensor]:
    """The method's score of every weight, in its shape; layers it cannot see are left out."""
    # Single weights: matrices without padding, and no competition between layers.
    single: Pattern = BlockSparse((1, 1), sparsity)
    layers = {
        name: Layer(name, [module])
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE) and module.weight.is_floating_point()
    }
    statistics: Mapping[str, Tensor] = {}
    if method.statistic is not None:
        with_patterns = {name: (layer, single) for name, layer in layers.items()}
        statistics = method.statistic(Unpruned(model, with_patterns, batches or (), seed))
    out: dict[nn.Module, Tensor] = {}

    def add(layer: Layer, columns: Sequence[Columns | None]) -> None:
        weight = layer.weight.detach()
        matrices = layer.matrices(
            weight.to(torch.promote_types(weight.dtype, torch.float32)), single
        )
        score = [method.score] * layer.groups
        if method.statistic is not None:
            if layer.name not in statistics:
                return
            mine = layer.matrices(statistics[layer.name].to(weight.device), single)
            score = [with_statistic(method.score, part) for part in mine]
        parts = [rank(w, c) for rank, w, c in zip(score, matrices, columns, strict=True)]
        out[layer.modules[0]] = layer.from_matrices(torch.stack(parts))

    with torch.no_grad():
        if batches is None or method.needs != "inputs" or method.statistic is not None:
            for layer in layers.values():
                add(layer, [None] * layer.groups)
            return out
        options = ReconstructionOptions()
        with Calibration(model, batches, list(layers.values()), CACHE_BYTES) as calibrated:
            for group in calibrated.groups:
                moments = calibrated.moments(group)
                columns = [known_columns(moment, options) for moment in moments]
                for layer in group.layers:
                    add(layer, columns)
                calibrated.done(group)
    return out


# --- which channels go together -------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """What the caller says about layers, by name."""

    targets: str | Sequence[str] | None
    ignore: str | Sequence[str] | None
    heads: Mapping[str, int]

    def check(self, names: Sequence[str]) -> None:
        for expressions, what in ((self.targets, "targets"), (list(self.heads), "heads")):
            require_match(_listed(expressions), names, what)

    def reason(self, layers: Sequence[str]) -> str:
        """Why a group stays, as far as the names of its layers say."""
        ignored = [name for name in layers if _any(name, self.ignore)]
        if ignored:
            return f"ignore= names {ignored[0]}"
        if self.targets is not None and not any(_any(name, self.targets) for name in layers):
            return "targets= names none of its layers"
        return ""

    def named(self, layers: Sequence[str]) -> bool:
        return self.targets is not None and any(_any(name, self.targets) for name in layers)

    def heads_of(self, layer: str) -> int | None:
        return next((count for name, count in self.heads.items() if match(layer, name)), None)


class _Groups:
    """Every set of channels that must be cut together."""

    def __init__(self, graphs: Any, model: nn.Module, example: Batch) -> None:
        self._graphs = graphs
        self._model = model
        self.names = {module: name for name, module in model.named_modules()}
        self._order = {name: place for place, name in enumerate(self.names.values())}
        returned: list[Any] = []

        def forward(traced: nn.Module, _: Any) -> Any:
            returned.append(example(traced))
            return returned[-1]

        with _tracing(model):
            try:
                self.graph = graphs.DependencyGraph().build_dependency(
                    model, None, forward_fn=forward, verbose=False
                )
                _refuse_rotations(self.graph.module2node.values())
                self._groups = list(
                    self.graph.get_all_groups(root_module_types=[nn.Conv1d, nn.Conv2d, nn.Linear])
                )
            except Exception as error:  # the library raises anything: it walks autograd's graph
                raise ValueError(
                    "prune_structured: the dependency graph cannot follow this model "
                    f"({type(error).__name__}: {error}); check that example_inputs fit it, and "
                    "that it returns tensors which depend on its weights"
                ) from error
        self._shapes = _shapes(returned[-1])
        self._outputs = {
            leaf.grad_fn for leaf in tree_leaves(returned[-1]) if isinstance(leaf, Tensor)
        }
        owners: dict[Tensor, set[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(module)
        self._shared = {m for modules in owners.values() if len(modules) > 1 for m in modules}

    def pick(self, sparsity: float, round_to: int, choice: _Choice) -> list[_Cut]:
        """Decide how much of each group goes.

        Raises:
            ValueError: nothing of any.
        """
        choice.check([name for module, name in self.names.items() if isinstance(module, PRUNABLE)])
        out = []
        for group in self._groups:
            layers, readers = self._members(group)
            before = kept = len(group[0].idxs)
            unit = 1
            reason = choice.reason(layers) or self._stays(group, layers, choice)
            attention: list[nn.Module] = []
            if not reason and self._multiplied(group):
                attention = [self._model.get_submodule(_parent(name)) for name in layers]
                unit, reason = self._head_length(layers, choice)
            if not reason:
                kept = _kept(before, unit, sparsity, round_to)
                if kept == before:
                    step = math.lcm(unit, round_to)
                    reason = f"what would be left of {before} is no multiple of {step}"
            members = tuple(layers), tuple(readers)
            out.append(_Cut(self.graph, group, *members, before, kept, unit, attention, reason))
        out.sort(key=lambda cut: self._order[cut.layers[0]])
        if all(cut.reason for cut in out):
            why = "; ".join(f"{cut.layers[0]}: {cut.reason}" for cut in out[:5])
            raise ValueError(
                f"prune_structured: nothing can be cut ({why or 'no layers were found'}); check "
                "targets and ignore, or lower round_to"
            )
        return out

    def check(self, example: Batch) -> None:
        """Run the smaller model: what comes out must have the same shapes."""
        with eval_mode(self._model), torch.no_grad():
            try:
                shapes = _shapes(example(self._model))
            except Exception as error:
                raise ValueError(
                    "prune_structured: the model does not run any more with its channels cut "
                    f"({type(error).__name__}: {error}); name the layers that depend on a fixed "
                    "size in ignore="
                ) from error
        if shapes != self._shapes:
            raise ValueError(
                f"prune_structured: with its channels cut the model returns shapes {shapes} "
                f"instead of {self._shapes}; name the layers that make its outputs in ignore="
            )

    def _members(self, group: Any) -> tuple[list[str], list[str]]:
        """Layers that put the channels out, and those that read them."""
        layers: list[str] = []
        readers: list[str] = []
        for dep, _ in group:
            name = self.names.get(dep.target.module)
            if name is None or not isinstance(dep.target.module, PRUNABLE):
                continue
            out = self.graph.is_out_channel_pruning_fn(dep.handler)
            (layers if out else readers).append(name)
        return sorted(layers, key=self._order.__getitem__), sorted(
            readers, key=self._order.__getitem__
        )

    def _stays(self, group: Any, layers: Sequence[str], choice: _Choice) -> str:
        """Why the structure of a group forbids to cut it."""
        for dep, _ in group:
            module, name = dep.target.module, self.names.get(dep.target.module, "")
            out = self.graph.is_out_channel_pruning_fn(dep.handler)
            if out and (
                dep.target.grad_fn in self._outputs or type(module).__name__ == "_OutputOp"
            ):
                return "they are outputs of the model"
            if isinstance(module, _TIED):
                return f"{type(module).__name__} {name} ties them together"
            if isinstance(module, nn.modules.conv._ConvNd):
                depthwise = module.groups == module.in_channels == module.out_channels
                if module.groups > 1 and not depthwise:
                    return f"the grouped convolution {name} ties them together"
            if module in self._shared:
                return f"{name} shares a parameter with another module"
            if isinstance(module, nn.Module) and parametrize.is_parametrized(module):
                return f"{name} is parametrised: remove the parametrisation first"
            if isinstance(module, nn.Embedding | nn.Parameter) and not choice.named(layers):
                kind = "an embedding" if isinstance(module, nn.Embedding) else "a free parameter"
                return f"they are the width of {kind}; targets= naming a layer cuts them"
        return ""

    def _multiplied(self, group: Any) -> bool:
        """Whether activations with these channels are multiplied with each other: attention."""
        return any(
            product in str(dep.target.module).lower()
            for dep, _ in group
            if dep.target.module not in self.names
            for product in _PRODUCTS
        )

    def _head_length(self, layers: Sequence[str], choice: _Choice) -> tuple[int, str]:
        """Channels of one head, or why it is not known."""
        widths = {int(self._model.get_parameter(f"{name}.weight").shape[0]) for name in layers}
        if len(layers) < 3 or len(widths) > 1:
            return 1, "attention without queries, keys and values of one width from a layer each"
        (width,) = widths
        counts = {choice.heads_of(name) for name in layers} - {None}
        counts = counts or {_own_heads(self._model.get_submodule(_parent(n))) for n in layers}
        count = counts.pop()
        if counts or count is None:
            return 1, "attention with an unknown number of heads; pass heads={name: count}"
        if count < 1 or width % count:
            raise ValueError(
                f"prune_structured: {layers[0]} has {width} output channels, which {count} heads "
                "cannot share; check heads="
            )
        return width // count, ""


@dataclass(frozen=True)
class _Cut:
    """A group of whose channels `kept` stay, in whole units (the channels of a head)."""

    graph: Any
    group: Any
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    before: int
    kept: int
    unit: int
    attention: Sequence[nn.Module]
    reason: str

    def cut(self, scores: Mapping[nn.Module, Tensor]) -> PrunedGroup:
        """Take the channels of the lowest worth out of all layers of the group."""
        stay = torch.ones(self.before // self.unit, dtype=torch.bool)
        if not self.reason:
            worth = self._worth(scores).view(-1, self.unit).sum(1)
            order = worth.argsort(descending=True, stable=True)
            stay[order[self.kept // self.unit :]] = False
        stay = stay.repeat_interleave(self.unit)
        heads = None
        if not self.reason:
            root = self.group[0].dep
            drop = (~stay).nonzero().flatten().tolist()
            self.graph.get_pruning_group(root.target.module, root.handler, drop).prune()
            if self.attention:
                heads = self.before // self.unit, self.kept // self.unit
            for module in self.attention:
                self._tell(module)
        kept = tuple(stay.nonzero().flatten().tolist())
        return PrunedGroup(self.layers, self.readers, self.before, kept, heads, self.reason)

    def _tell(self, attention: nn.Module) -> None:
        """Bring what a module knows about its heads up to date."""
        for names, size in ((_HEAD_COUNTS, self.unit), (_HEAD_LENGTHS, 1)):
            for name in names:
                if getattr(attention, name, None) == self.before // size:
                    setattr(attention, name, self.kept // size)

    def _worth(self, scores: Mapping[nn.Module, Tensor]) -> Tensor:
        """The sum of the scores of all weights that each channel takes with it."""
        total = torch.zeros(self.before, dtype=torch.float64)
        for item in self.group:
            score = scores.get(item.dep.target.module)
            if score is None:
                continue
            if not self.graph.is_out_channel_pruning_fn(item.dep.handler):
                score = score.transpose(0, 1)
            sums = score.flatten(1).sum(1, dtype=torch.float64).cpu()
            total.index_add_(0, torch.tensor(item.root_idxs), sums[torch.tensor(item.idxs)])
        return total


def _refuse_rotations(nodes: Iterable[Any]) -> None:
    """Refuse rotary embeddings, on which the library's search for groups does not end.

    They cut a tensor along a dimension and join the parts along the same one in another order.
    """
    for joined in nodes:
        if type(joined.module).__name__ != "_ConcatOp":
            continue
        dim: int = getattr(joined.grad_fn, "_saved_dim", 0)
        sources: list[Any] = []
        for part in joined.inputs:
            while type(part.module).__name__ == "_ElementWiseOp" and len(part.inputs) == 1:
                part = part.inputs[0]
            # Autograd keeps a negative dimension as an unsigned number.
            if type(part.module).__name__ == "_SliceOp" and (dim == part.module.dim or dim >> 63):
                sources += part.inputs
        if len(sources) > len(set(sources)):
            raise NotImplementedError("it rotates channels, as rotary position embeddings do")


def _kept(before: int, unit: int, sparsity: float, round_to: int) -> int:
    """The least number of channels, in whole units and multiples of `round_to`, that is enough."""
    step = math.lcm(unit, round_to)
    # 0.1 + 0.2 channels too many are none.
    least = math.ceil(before * (1.0 - sparsity) / step - 1e-9)
    return min(before, max(1, least) * step)


def _own_heads(attention: nn.Module) -> int | None:
    """The number of heads that a module says it has."""
    found = {getattr(attention, name, None) for name in _HEAD_COUNTS} - {None}
    return found.pop() if len(found) == 1 else None


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else ""


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(expressions: str | Sequence[str] | None) -> list[str]:
    if expressions is None:
        return []
    return [expressions] if isinstance(expressions, str) else list(expressions)


def _any(name: str, expressions: str | Sequence[str] | None) -> bool:
    return any(match(name, expression) for expression in _listed(expressions))


def _shapes(returned: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


# --- the model around the cutting -----------------------------------------------------------------


@contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients everywhere: the library reads autograd's graph."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    with eval_mode(model), torch.enable_grad():
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Give every module its parameters, buffers, sizes and hooks back if the block raises.

    Cutting replaces parameters and leaves the old ones as they are, so that no copy is needed.
    """
    before = {
        module: {
            key: value.copy() if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for module in model.modules()
    }
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    try:
        yield
    except BaseException:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
        raise
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
