"""What a graph with our nodes may not have, because a reader would refuse or silently change it."""

from __future__ import annotations

import onnx
from onnxscript import ir

from sparsekit.export.calls import nodes_of
from sparsekit.export.nodes import DOMAIN, MAX_INT, SparseNode
from sparsekit.export.trace import PACKED

# TensorRT's parser widens the first to int32 and refuses the others.
_REFUSED = ("UINT8", "INT16", "UINT16", "UINT32")


def lint(model: ir.Model) -> list[str]:
    """The problems of our nodes in a graph, one line each.

    Args:
        model: as `onnxscript.ir.load` reads it.
    """
    problems: list[str] = []
    for node in nodes_of(model):
        if node.domain in (DOMAIN, PACKED):
            where = f"{node.op_type} {node.name or node.outputs[0].name}"
            problems += [f"{where}: {problem}" for problem in _problems(node)]
    return problems


def _problems(node: ir.Node) -> list[str]:
    if node.domain == PACKED:
        return ["was not lowered"]
    found = []
    if onnx.defs.has(node.op_type, ""):
        found.append("has the name of an ONNX operator, which parsers read it as")
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    namespace = attributes.get("plugin_namespace")
    if namespace != node.domain:
        found.append(f"plugin_namespace is {namespace!r}, the domain {node.domain!r}")
    for name, value in attributes.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(n, int) and not -MAX_INT <= n <= MAX_INT for n in numbers):
            found.append(f"{name} is {value}, beyond an int32")
    for value in node.inputs:
        constant = None if value is None else value.const_value
        if constant is not None and constant.dtype.name in _REFUSED:
            found.append(f"the constant {value.name} is {constant.dtype.name}, expected INT32")
    return found or _misfits(node, attributes)


def _misfits(node: ir.Node, attributes: dict[str, object]) -> list[str]:
    """Whether the node is one by docs/onnx.md."""
    try:
        size = SparseNode.parse(node.op_type, attributes).weight_size()
    except ValueError as error:
        return [str(error)]
    constant = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] else None
    if constant is None:
        return ["the weight is no constant"]
    if size is not None and list(constant.shape) != [size]:
        return [f"the weight has shape {list(constant.shape)}, expected [{size}]"]
    return []
