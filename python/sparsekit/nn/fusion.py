"""Which activation modules can move into the linear layer before them.

The proof is the parent's own graph (torch.fx, children kept whole): the layer is called once, its
output goes to the activation module and nowhere else, and that module is called once. `convert`
adds what a graph cannot know: that nobody calls the layer or the activation from elsewhere.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional


@dataclass(frozen=True)
class Fusion:
    """An activation that can be fused.

    Attributes:
        parent: the module whose graph proves it.
        attribute: the activation's name in `parent`.
        module: the activation module.
        activation: its name in an epilogue, e.g. `"gelu"`.
    """

    parent: nn.Module
    attribute: str
    module: nn.Module
    activation: str


def activation_name(module: nn.Module) -> str | None:
    """The epilogue's name of an activation module, or None if it is no such activation.

    Exact types only: a subclass may do something else. Classes of transformers and timm are
    recognised by their names, so that neither has to be installed.
    """
    kind = type(module)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(module.approximate))
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == "transformers.activations.SiLUActivation":
        return "silu"
    if name == "timm.layers.activations.GELU":
        return "gelu"
    if name == "timm.layers.activations.GELUTanh":
        return "gelu_tanh"
    if name == "timm.layers.activations.Swish":
        return "silu"
    if name in ("transformers.activations.GELUActivation", "transformers.activations.GELUTanh"):
        function = module.act
        if function is functional.gelu:
            return "gelu"
        if isinstance(function, functools.partial) and function.func is functional.gelu:
            return "gelu_tanh" if function.keywords == {"approximate": "tanh"} else None
    return None


def find(model: nn.Module, layers: Sequence[nn.Linear]) -> dict[int, Fusion]:
    """The fusions that the graphs of the layers' parents prove.

    Args:
        model: the whole model.
        layers: the candidates.

    Returns:
        `id(layer)` to fusion. Layers and activations that appear in several places are left out.
    """
    wanted = {id(layer) for layer in layers}
    places: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    found: dict[int, Fusion] = {}
    for parent in model.modules():
        children = [child for child in parent._modules.values() if child is not None]
        if not any(id(child) in wanted for child in children):
            continue
        if not any(activation_name(child) and places[id(child)] == 1 for child in children):
            continue
        graphs = [_graph(parent, training) for training in (False, True)]
        if any(graph is None for graph in graphs):
            continue
        plans = [_plans(parent, graph, wanted) for graph in graphs if graph is not None]
        for key, plan in plans[0].items():
            if plans[1].get(key) == plan and places[key] == 1 == places[id(plan.module)]:
                found[key] = plan
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody hooked into calls of the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _ParentTracer(fx.Tracer):
    """Traces one module's own forward; every child is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graph(parent: nn.Module, training: bool) -> fx.Graph | None:
    """The graph of the parent's forward, or None when it cannot stand for every call."""
    if "forward" in parent.__dict__:
        return None
    for parameter in inspect.signature(type(parent).forward).parameters.values():
        # An optional argument may steer the forward pass in ways that one trace does not show.
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or parameter.default is not parameter.empty:
            return None
    attributes = dict(parent.__dict__)
    try:
        parent.training = training
        return _ParentTracer().trace(parent)
    except Exception:
        return None  # tracing runs foreign code, which may fail in any way: there is no proof then
    finally:
        parent.__dict__.clear()
        parent.__dict__.update(attributes)


def _plans(parent: nn.Module, graph: fx.Graph, wanted: set[int]) -> dict[int, Fusion]:
    calls: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    found: dict[int, Fusion] = {}
    for target, nodes in calls.items():
        layer = parent._modules.get(target)
        if layer is None or id(layer) not in wanted or len(nodes) != 1 or len(nodes[0].users) != 1:
            continue
        user = next(iter(nodes[0].users))
        if user.op != "call_module" or len(calls[user.target]) != 1:
            continue
        module = parent._modules.get(str(user.target))
        if module is None or user.args != (nodes[0],) or user.kwargs:
            continue
        if has_hooks(module) or "forward" in module.__dict__:
            continue
        name = activation_name(module)
        if name is not None:
            found[id(layer)] = Fusion(parent, str(user.target), module, name)
    return found
