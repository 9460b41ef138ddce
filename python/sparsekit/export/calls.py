"""The calls of our operators in a graph, and what takes their place."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from onnxscript import ir, optimizer
from torch import Tensor

from sparsekit import _native
from sparsekit.export.nodes import CONV2D, DOMAIN, VERSION, Window
from sparsekit.export.trace import PACKED
from sparsekit.pack import unpacked

_BUFFER = "packed_data"


@dataclass(frozen=True)
class Call:
    """One call of `torch.ops.sparsekit.linear` or `conv2d`.

    Attributes:
        node: of the domain `PACKED`.
        layer: name of the module whose weight it takes; of a function's call that of its result.
        constants: the packed weight and the bias or None; calls that share them share a weight.
        activation: its name, or None.
        residual_first: whether the residual is added before the activation.
        window: of a convolution; else None.
    """

    node: ir.Node
    layer: str
    constants: tuple[ir.Value, ir.Value | None]
    activation: str | None
    residual_first: bool
    window: Window | None

    # Read when they are needed: what they come from may itself be a call that was replaced.
    @property
    def x(self) -> ir.Value:
        """The input."""
        value: ir.Value = self.node.inputs[0]
        return value

    @property
    def residual(self) -> ir.Value | None:
        """What is added, or None."""
        return _input(self.node, 3)

    def canonical(self) -> _native.Canonical:
        """The weight, from the packed bytes; those of a model on a GPU are copied."""
        groups = 1 if self.window is None else self.window.group
        return unpacked(self._constant(self.constants[0], "packed weight"), groups)

    def bias(self) -> Tensor | None:
        """The bias, on the CPU."""
        value = self.constants[1]
        return None if value is None else self._constant(value, "bias")

    def _constant(self, value: ir.Value, what: str) -> Tensor:
        tensor = _constant(value)
        if tensor is None:
            raise ValueError(
                f"export: the {what} of {self.layer!r} is computed by the graph or comes in as an "
                "input; a node holds constants: keep the PackedWeight and its bias in the model"
            )
        return tensor


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(value: ir.Value) -> Tensor | None:
    """The tensor that a value always is, on the CPU; None where it depends on inputs."""
    if value.const_value is not None:
        return _tensor(value.const_value)
    node = value.producer()
    # What autocast makes of a constant, in exporters that do not compute it.
    if node is None or (node.domain, node.op_type) != ("", "Cast"):
        return None
    source, dtype = _constant(node.inputs[0]), node.attributes["to"].as_int()
    return None if source is None else source.to(_TORCH_DTYPES[ir.DataType(dtype)])


def _tensor(value: ir.TensorProtocol) -> Tensor:
    raw = getattr(value, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach().cpu().contiguous()
    array = value.numpy()
    bits = {torch.bfloat16: "int16", torch.float16: "int16"}
    dtype = _TORCH_DTYPES[value.dtype]
    copy = torch.from_numpy(array.view(bits.get(dtype, array.dtype)).copy())
    return copy.view(dtype)


_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.UINT8: torch.uint8,
}


def find_calls(model: ir.Model, modules: Collection[str]) -> list[Call]:
    """The calls in a traced model, those in branches included, in the graph's order.

    Args:
        model: traced.
        modules: names of the sparse modules in the model that it was made from.
    """
    return [_call(node, modules) for node in nodes_of(model) if node.domain == PACKED]


def _layer(node: ir.Node, modules: Collection[str]) -> str:
    # The exporter notes which modules a call is in. It merges small constants that are equal, so
    # names of these only speak for calls that are in no sparse module.
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    for scope in reversed(ast.literal_eval(scopes)):
        if scope in modules:
            return str(scope)
    module, _, buffer = str(node.inputs[1].name).rpartition(".")
    return module if buffer == _BUFFER and module in modules else str(node.outputs[0].name)


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def _call(node: ir.Node, modules: Collection[str]) -> Call:
    attributes = node.attributes
    window = None
    if node.op_type == CONV2D:
        kernel_shape, strides, dilations, pads = (
            tuple(attributes[name].as_ints())
            for name in ("kernel_shape", "strides", "dilations", "pads")
        )
        window = Window(
            attributes["channels"].as_int(),
            (kernel_shape[0], kernel_shape[1]),
            (strides[0], strides[1]),
            (dilations[0], dilations[1]),
            (pads[0], pads[1], pads[2], pads[3]),
            attributes["group"].as_int(),
        )
    return Call(
        node,
        _layer(node, modules),
        (node.inputs[1], _input(node, 2)),
        attributes["activation"].as_string() or None,
        bool(attributes["residual_first"].as_int()),
        window,
    )


class Constants:
    """New initialisers of a model, each under a name that is free."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._taken = {value.name for node in nodes_of(model) for value in node.outputs}
        self._taken |= {value.name for value in model.graph.inputs}

    def add(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A constant of the graph."""
        name = name.lstrip(".")  # of a model that is itself the layer
        free, number = name, 0
        while free in self._taken or free in self._graph.initializers:
            number += 1
            free = f"{name}_{number}"
        value = ir.Value(
            name=free,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        self._graph.initializers[free] = value
        return value


def replace(call: Call, nodes: Sequence[ir.Node], result: ir.Value) -> None:
    """Put nodes in the place of a call."""
    graph = call.node.graph
    ir.convenience.replace_nodes_and_values(
        graph, call.node, [call.node], nodes, call.node.outputs, [result]
    )


def finish(model: ir.Model, calls: Sequence[Call], ours: bool) -> None:
    """Remove what the calls alone needed: packed bytes, biases, casts, the domain `PACKED`.

    Args:
        ours: whether there are nodes of our domain now.
    """
    optimizer.remove_unused_nodes(model)
    for value in (value for call in calls for value in call.constants if value is not None):
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(str(value.name), None)
    for container in (model, *model.functions.values()):
        container.opset_imports.pop(PACKED, None)
    if ours:
        model.opset_imports[DOMAIN] = VERSION
