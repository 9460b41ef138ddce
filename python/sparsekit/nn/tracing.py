"""The graph of one module's own forward, its children kept whole (torch.fx)."""

from __future__ import annotations

import inspect
import operator
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class Trace:
    """What a forward pass does.

    Attributes:
        graph: its graph; calls of children are its `call_module` nodes.
        is_pure: the graph is all of it: tracing left nothing behind in the module, and drew no
            random number.
    """

    graph: fx.Graph
    is_pure: bool


class _Proxy(fx.Proxy):
    """A value of the graph that tells where fx's own would mislead."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # A proxy is no tensor, so isinstance() would lead a forward into the wrong branch.
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.fx"):
            raise TypeError("the forward asks what its input is, which a trace cannot tell")
        return _Proxy

    def __iadd__(self, other: Any) -> fx.Proxy:
        # fx would show `y = y + x`.
        proxy: fx.Proxy = self.tracer.create_proxy(
            "call_function", operator.iadd, (self, other), {}
        )
        return proxy


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(parent: nn.Module, training: bool) -> Trace | None:
    """Trace the forward of a module in one mode.

    Returns:
        None when no graph could stand for every call: the forward was replaced, takes optional
        arguments (which may steer it in ways that one trace does not show), or depends on values.
    """
    if "forward" in parent.__dict__:
        return None
    for parameter in inspect.signature(type(parent).forward).parameters.values():
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or parameter.default is not parameter.empty:
            return None
    before, drawn = _Snapshot(parent), _random_states()
    graph: fx.Graph | None = None
    try:
        parent.training = training
        # A forward that asks whether gradients are wanted gets the usual answer of its mode.
        with torch.set_grad_enabled(training):
            graph = _Tracer().trace(parent)
    except Exception:
        pass  # foreign code may fail in any way: there is no proof then
    is_pure = before.restore() and _random_states() == drawn
    return None if graph is None else Trace(graph, is_pure)


def _random_states() -> tuple[Any, bytes]:
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


class _Snapshot:
    """A module's attributes, and what its lists, dicts and sets hold."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(module.__dict__)
        self._contents = {
            name: value.copy()
            for name, value in self._attributes.items()
            if isinstance(value, list | dict | set)
        }

    def restore(self) -> bool:
        """Put everything back; whether nothing but the mode had changed."""
        now = self._module.__dict__
        names = self._attributes.keys() - {"training"}
        same = now.keys() - {"training"} == names and all(
            now[name] is self._attributes[name] for name in names
        )
        now.clear()
        now.update(self._attributes)
        for name, content in self._contents.items():
            value = self._attributes[name]
            if _identities(value) != _identities(content):
                same = False
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
        return same


def _identities(container: list[Any] | dict[Any, Any] | set[Any]) -> list[int]:
    if isinstance(container, dict):
        return [id(part) for item in container.items() for part in item]
    return [id(item) for item in container]
