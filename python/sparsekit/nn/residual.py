"""Residual adds inside sparse convolutions, by a rewritten forward.

A block of a residual network ends with `act(conv(x) + shortcut)`. The kernels can add and activate
by themselves, but the block's own code does it, so that code is rewritten: its graph is traced
(torch.fx), and each sparse convolution takes over what follows it. The block stays what it was: the
same object with the same children and attributes, of a subclass that has another forward. The
children still compute what they did, so the old forward holds as well.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsekit._ops import conv2d_size
from sparsekit.filters import FilterShape
from sparsekit.functional import conv_packed
from sparsekit.nn.conv import SparseConv1d, SparseConv2d
from sparsekit.nn.fusion import activation_name, is_watched, passes_through, within_reach
from sparsekit.nn.packed import PackedModule
from sparsekit.nn.tracing import trace
from sparsekit.workload import activate

_ADDS = (operator.add, operator.iadd, torch.add)
_ACTIVATIONS: dict[Any, str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    "relu": "relu",
    "relu_": "relu",
    functional.relu6: "relu6",
    functional.silu: "silu",
}


@dataclass(frozen=True)
class Absorbed:
    """What a convolution does now beside its own work.

    Attributes:
        conv: the convolution.
        residual: whether it adds another value.
        activation: the activation after that, or None.
    """

    conv: SparseConv1d | SparseConv2d
    residual: bool
    activation: str | None


def fuse_residuals(model: nn.Module) -> list[Absorbed]:
    """Let each sparse convolution of a model do the add and the activation that follow it.

    Only where the graph of the parent's forward proves it: one graph for both modes, without
    optional arguments, and nobody else reads what lies between. What the forward takes from the
    parent's attributes is fixed from then on, and hooks that are put on activation modules later
    are not called. Copies, pickles and `torch.compile` work; files do not hold it: call it again
    after `sparsekit.load`.

    Args:
        model: converted, batch normalisations folded. A second time nothing is left to do.

    Returns:
        What was fused.
    """
    return [each for parent in list(model.modules()) for each in _rewrite(parent)]


def _rewrite(parent: nn.Module) -> list[Absorbed]:
    if not any(_free(child) for child in within_reach(parent)):
        return []
    before = type(parent)
    parent.__class__ = getattr(before, "_plain", before)
    absorbed = _absorb(parent) if _may_be_subclassed(type(parent)) else []
    if len(absorbed) > getattr(before, "_absorbed", 0):
        return absorbed
    parent.__class__ = before
    return []


def _absorb(parent: nn.Module) -> list[Absorbed]:
    traces = [trace(parent, training) for training in (False, True)]
    graphs = [each.graph for each in traces if each is not None and each.is_pure]
    if len(graphs) < 2 or _listing(graphs[0]) != _listing(graphs[1]):
        return []
    graph = graphs[0]
    absorbed: list[Absorbed] = []
    for node in list(graph.nodes):
        if node.op == "call_module":
            conv = _free(parent.get_submodule(str(node.target)))
            match = _match(parent, node) if conv else None
            if conv and match and _may_wait(parent, node, match):
                _replace(graph, node, match)
                absorbed.append(Absorbed(conv, match.residual is not None, match.activation))
    if absorbed:
        graph.lint()
        _install(parent, graph, len(absorbed))
    return absorbed


def _free(module: nn.Module) -> SparseConv1d | SparseConv2d | None:
    """The module if it is a sparse convolution that can take on an activation."""
    if not isinstance(module, SparseConv1d | SparseConv2d) or is_watched(module):
        return None
    return module if module.activation is None else None


def _may_be_subclassed(kind: type[nn.Module]) -> bool:
    """Whether objects of a subclass still copy and pickle as `_install` has it."""
    # A slice of an nn.Sequential is made with the class of the whole.
    return (
        not issubclass(kind, nn.Sequential)
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__new__ is object.__new__
    )


def _listing(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph in a form that can be compared with another's."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    listing = []
    for node in graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda each: f"%{number[each]}")
        listing.append((node.op, node.target, repr(arguments)))
    return listing


# --- what follows a convolution ---------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """A chain of calls that are one: the convolution, what passes through, an add, an activation.

    The convolution moves to where the add is; without one it stays.
    """

    chain: list[fx.Node]
    at: fx.Node
    residual: fx.Node | None
    activation: str | None


def _match(parent: nn.Module, conv: fx.Node) -> _Match | None:
    if len(conv.args) != 1 or conv.kwargs:
        return None
    chain, at, residual, activation = [conv], conv, None, None
    while activation is None and len(chain[-1].users) == 1:
        node = chain[-1]
        user = next(iter(node.users))
        if _is_pass(parent, node, user):
            pass
        elif residual is None and (other := _other_summand(node, user)) is not None:
            at, residual = user, other
        elif (name := _activation(parent, node, user)) is not None:
            activation = name
        else:
            break
        chain.append(user)
    if residual is None and activation is None:
        return None
    return _Match(chain, at, residual, activation)


def _is_pass(parent: nn.Module, node: fx.Node, user: fx.Node) -> bool:
    return (
        user.op == "call_module"
        and user.args == (node,)
        and not user.kwargs
        and passes_through(parent.get_submodule(str(user.target)))
    )


def _other_summand(node: fx.Node, user: fx.Node) -> fx.Node | None:
    function = user.op == "call_function" and user.target in _ADDS
    method = user.op == "call_method" and user.target in ("add", "add_")
    if not (function or method) or len(user.args) != 2 or user.kwargs not in ({}, {"alpha": 1}):
        return None
    first, second = user.args
    if first is node and isinstance(second, fx.Node) and second is not node:
        return second
    in_place = user.target in (operator.iadd, "add_")
    if second is node and isinstance(first, fx.Node) and first is not node and not in_place:
        return first
    return None


def _activation(parent: nn.Module, node: fx.Node, user: fx.Node) -> str | None:
    if user.args != (node,):
        return None
    if user.op == "call_module":
        module = parent.get_submodule(str(user.target))
        return None if user.kwargs or is_watched(module) else activation_name(module)
    if user.op not in ("call_function", "call_method"):
        return None
    if user.target is functional.gelu:
        kind = user.kwargs.get("approximate", "none")
        known = user.kwargs.keys() <= {"approximate"}
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(kind)) if known else None
    return _ACTIVATIONS.get(user.target) if user.kwargs.keys() <= {"inplace"} else None


def _may_wait(parent: nn.Module, conv: fx.Node, match: _Match) -> bool:
    """Whether nothing that runs before the add may change the convolution's input."""
    reach = _may_share_memory(parent, conv.args[0])
    node = conv
    while node is not match.at:
        may_write = node not in match.chain and not _only_reads(parent, node)
        if may_write and any(value in reach for value in node.all_input_nodes):
            return False
        node = node.next
    return True


def _only_reads(parent: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    return node.target in (operator.getitem, getattr) or _is_fresh(parent, node)


def _may_share_memory(parent: nn.Module, value: Any) -> set[fx.Node]:
    """Values that may be the same memory, in either direction of the graph."""
    found: set[fx.Node] = set()
    open_nodes = [value] if isinstance(value, fx.Node) else []
    while open_nodes:
        node = open_nodes.pop()
        if node in found:
            continue
        found.add(node)
        if not _is_fresh(parent, node):
            open_nodes.extend(node.all_input_nodes)
        open_nodes.extend(user for user in node.users if not _is_fresh(parent, user))
    return found


def _is_fresh(parent: nn.Module, node: fx.Node) -> bool:
    """Whether a value is in memory of its own, and its inputs are only read."""
    if node.op != "call_module":
        return node.target is conv_add
    module = parent.get_submodule(str(node.target))
    dense = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    known = dense or isinstance(module, PackedModule) or type(module) is nn.BatchNorm2d
    return known and not is_watched(module)


# --- the new forward --------------------------------------------------------------------------


def _replace(graph: fx.Graph, conv: fx.Node, match: _Match) -> None:
    with graph.inserting_before(match.at):
        module = graph.create_node("get_attr", conv.target)
        arguments = (module, conv.args[0], match.residual, match.activation)
        fused = graph.call_function(conv_add, arguments)
    match.chain[-1].replace_all_uses_with(fused)
    for node in reversed(match.chain):
        graph.erase_node(node)


def conv_add(conv: nn.Module, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """`activation(conv(x) + residual)`, in one kernel where that can be."""
    free = _free(conv)
    if free is not None:
        return _packed_add(free.arguments(x), activation, residual)
    y: Tensor = conv(x)
    return activate(y if residual is None else y + residual, activation)


def _packed_add(
    arguments: dict[str, Any], activation: str | None, residual: Tensor | None
) -> Tensor:
    if residual is None or _fits(residual, **arguments):
        return conv_packed(
            **arguments, activation=activation, residual=residual, residual_first=True
        )
    # A value that is broadcast, or of another dtype, is none that a kernel adds.
    return activate(conv_packed(**arguments) + residual, activation)


torch.fx.wrap("_packed_add")


def _fits(
    residual: Any,
    x: Tensor,
    filters: FilterShape,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    **_: Any,
) -> bool:
    if not isinstance(residual, Tensor) or residual.dtype != dtype or residual.device != x.device:
        return False
    dims = filters.dims
    image = [1, *x.shape[-1:]] if dims == 1 else list(x.shape[-2:])
    size = conv2d_size(image, filters.kernel_size, stride, padding, dilation)
    return list(residual.shape) == [*x.shape[: -dims - 1], filters.out_channels, *size[2 - dims :]]


def _install(parent: nn.Module, graph: fx.Graph, absorbed: int) -> None:
    """Give the object a subclass of its class, which differs in its forward alone."""
    kind = type(parent)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{kind.__qualname__} with fused residuals>", "exec"), namespace)
    members = {
        "forward": namespace["forward"],
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__new__": _plain_new,
        "__reduce_ex__": _reduce,
        "_plain": kind,
        "_absorbed": absorbed,
    }
    parent.__class__ = type(f"Fused{kind.__name__}", (kind,), members)


def _plain_new(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Who makes another object by `type(module)(...)` gets one of the plain class."""
    # Without arguments it is torch.compile, which makes an empty object and copies the attributes.
    return cls._plain(*args, **kwargs) if args or kwargs else object.__new__(cls)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copies and pickles hold the plain class; the forward is rewritten where they arrive."""
    state = object.__reduce_ex__(self, 2)[2]
    return _restored, (self._plain,), state


def _restored(kind: type[nn.Module]) -> Any:
    pending: Any = type(kind.__name__, (kind,), {"__setstate__": _set_state, "_plain": kind})
    return pending.__new__(pending)


def _set_state(self: Any, state: Any) -> None:
    kind = self._plain
    self.__class__ = kind
    self.__setstate__(state)
    _rewrite(self)
