"""Which modules can move into the layer before them: batch normalisations and activations.

The proof is the parent's own graph (torch.fx, children kept whole): the layer is called once, its
output goes to the next module and nowhere else, and that module is called once; what passes its
input through unchanged may stand between. `convert` adds what a graph cannot know: that nobody
calls the layer or the modules from elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional

from sparsekit.nn.batchnorm import is_batchnorm
from sparsekit.nn.fused import FoldedBatchNorm, FusedActivation
from sparsekit.nn.tracing import trace


@dataclass(frozen=True)
class Place:
    """A module and where it is.

    Attributes:
        parent: the module that holds it.
        attribute: its name there.
        module: the module.
    """

    parent: nn.Module
    attribute: str
    module: nn.Module


@dataclass(frozen=True)
class Chain:
    """What follows a layer and nothing else: layer, batch normalisation, activation.

    Attributes:
        parent: the module whose graph proves it.
        batchnorm: the batch normalisation, if there is one.
        activation: the activation after that, if it is one that kernels can apply.
    """

    parent: nn.Module
    batchnorm: Place | None
    activation: Place | None

    @property
    def activation_name(self) -> str | None:
        """The activation's name in an epilogue."""
        return activation_name(self.activation.module) if self.activation else None


def activation_name(module: nn.Module) -> str | None:
    """The epilogue's name of an activation module, or None if it is no such activation.

    Exact types only: a subclass may do something else. Classes of transformers and timm are
    recognised by their names, so that neither has to be installed.
    """
    kind = type(module)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.ReLU6:
        return "relu6"
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


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def passes_through(module: nn.Module) -> bool:
    """Whether the module hands its input on unchanged, in every mode."""
    if type(module) in _DROPOUTS:
        return bool(module.p == 0) and not is_watched(module)
    if type(module) is FoldedBatchNorm:
        act = module._modules.get("act")
        return (act is None or passes_through(act)) and not is_watched(module)
    return type(module) in (nn.Identity, FusedActivation) and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked into calls of the module, or replaced its forward."""
    return "forward" in module.__dict__ or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody hooked into calls of the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def find(model: nn.Module, layers: Sequence[nn.Module]) -> dict[int, Chain]:
    """Look for batch normalisations and activations that follow one of the layers and nothing else.

    Args:
        model: the whole model.
        layers: the candidates.

    Returns:
        `id(layer)` to chain. Modules that appear in several places are left out.
    """
    wanted = {id(layer) for layer in layers}
    places: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    found: dict[int, Chain] = {}
    for parent in model.modules():
        children = list(within_reach(parent))
        if not any(id(child) in wanted for child in children):
            continue
        if not any(_can_follow(child) and places[id(child)] == 1 for child in children):
            continue
        traces = [trace(parent, training) for training in (False, True)]
        chains = [_chains(parent, each.graph, wanted) for each in traces if each is not None]
        if len(chains) < 2:
            continue
        for key, chain in chains[0].items():
            parts = [part for part in (chain.batchnorm, chain.activation) if part]
            alone = places[key] == 1 and all(places[id(part.module)] == 1 for part in parts)
            if alone and chains[1].get(key) == chain:
                found[key] = chain
    return found


def within_reach(parent: nn.Module) -> Iterator[nn.Module]:
    """The modules that a forward can call by itself: children, also those in lists and dicts."""
    for child in parent._modules.values():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from within_reach(child)
        elif child is not None:
            yield child


def _can_follow(module: nn.Module) -> bool:
    return is_batchnorm(module) or type(module) is FoldedBatchNorm or bool(activation_name(module))


def _chains(parent: nn.Module, graph: fx.Graph, wanted: set[int]) -> dict[int, Chain]:
    calls: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    found: dict[int, Chain] = {}
    for target, nodes in calls.items():
        layer = parent.get_submodule(target)
        if id(layer) in wanted and len(nodes) == 1:
            chain = _chain(parent, nodes[0], calls)
            if chain.batchnorm or chain.activation:
                found[id(layer)] = chain
    return found


def _chain(parent: nn.Module, node: fx.Node, calls: dict[Any, list[fx.Node]]) -> Chain:
    """Follow the output of a layer for as long as each value has one user."""
    batchnorm: Place | None = None
    while (user := only_user(node)) is not None and user.op == "call_module":
        owner, _, attribute = str(user.target).rpartition(".")
        module = parent.get_submodule(str(user.target))
        place = Place(parent.get_submodule(owner), attribute, module)
        if passes_through(module):
            node = user
            continue
        if is_watched(module) or len(calls[user.target]) != 1:
            break
        if activation_name(module):
            return Chain(parent, batchnorm, place)
        if is_batchnorm(module) and batchnorm is None:
            batchnorm = place
        elif type(module) is not FoldedBatchNorm:
            break
        act = module._modules.get("act")
        if act is not None and not passes_through(act):
            if is_watched(act) or not activation_name(act):
                break
            return Chain(parent, batchnorm, Place(module, "act", act))
        node = user
    return Chain(parent, batchnorm, None)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses a value, if it does nothing with others."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.args == (node,) and not user.kwargs else None
