"""The ONNX schemas of our nodes, with inference of types and shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema

from sparsekit._ops import conv2d_size
from sparsekit.export.nodes import (
    CONV2D,
    CONV_ATTRIBUTES,
    DOMAIN,
    LINEAR,
    LINEAR_ATTRIBUTES,
    QUICK,
    VERSION,
    SparseNode,
)

ELEMENT_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float16: onnx.TensorProto.FLOAT16,
}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_KINDS = {
    int: OpSchema.AttrType.INT,
    tuple: OpSchema.AttrType.INTS,
    str: OpSchema.AttrType.STRING,
}
# A dimension that is known (int), has a name (str), or neither.
Dim = int | str | None


@functools.cache
def register() -> None:
    """Tell this process's ONNX about our nodes, so that its checker and its inference know them.

    An ONNX older than 1.17 takes no inference from Python; it then keeps the shapes that a file has
    and infers none.
    """
    for name, attributes, read_as, infer in (
        (LINEAR, LINEAR_ATTRIBUTES, LINEAR, _linear_shape),
        (CONV2D, CONV_ATTRIBUTES, CONV2D, _conv2d_shape),
        (QUICK, {**LINEAR_ATTRIBUTES, "aot": int}, LINEAR, _linear_shape),
    ):
        schema = _schema(name, attributes)
        if hasattr(schema, "set_type_and_shape_inference_function"):
            schema.set_type_and_shape_inference_function(functools.partial(_infer, read_as, infer))
        onnx.defs.register_schema(schema)


def _schema(name: str, attributes: Mapping[str, type]) -> OpSchema:
    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc="See docs/onnx.md of sparsekit.",
        inputs=[
            parameter("x", "T"),
            parameter("weight", "tensor(int32)"),
            parameter("residual", "T", param_option=option.Optional),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", _FLOATS, "")],
        attributes=[
            OpSchema.Attribute(attribute, _KINDS[kind], "", required=True)
            for attribute, kind in attributes.items()
        ],
    )


def attribute_values(protos: Sequence[onnx.AttributeProto]) -> dict[str, Any]:
    """Attributes as `SparseNode.parse` takes them."""
    values = {proto.name: onnx.helper.get_attribute_value(proto) for proto in protos}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in values.items()
    }


def _infer(name: str, shape_of: Callable[[SparseNode, list[Dim]], list[Dim]], context: Any) -> None:
    names = LINEAR_ATTRIBUTES if name == LINEAR else CONV_ATTRIBUTES
    protos = [context.get_attribute(attribute) for attribute in names]
    node = SparseNode.parse(name, attribute_values([p for p in protos if p is not None]))
    types = [_tensor_type(context, index) for index in range(context.get_num_inputs())]
    _check_types(node, types)
    x = _dims(types[0])
    y = None if x is None else shape_of(node, x)
    residual = _dims(types[2]) if len(types) > 2 else None
    if y is not None and residual is not None and not _may_be_equal(y, residual):
        raise ValueError(f"{name}: residual has shape {residual}, the result has {y}")
    context.set_output_type(0, onnx.helper.make_tensor_type_proto(ELEMENT_TYPES[node.dtype], y))


def _tensor_type(context: Any, index: int) -> Any:
    kind = context.get_input_type(index)
    return None if kind is None or not kind.HasField("tensor_type") else kind.tensor_type


def _check_types(node: SparseNode, types: Sequence[Any]) -> None:
    expected = ELEMENT_TYPES[node.dtype]
    for index, name in ((0, "x"), (2, "residual")):
        kind = types[index] if index < len(types) else None
        if kind is not None and kind.elem_type not in (0, expected):
            number = onnx.TensorProto.DataType.Name
            raise ValueError(
                f"{node.op_type}: {name} is {number(kind.elem_type)}, dtype says {number(expected)}"
            )
    weight, words = _dims(types[1]), node.weight_size()
    if weight is not None and words is not None and not _may_be_equal(weight, [words]):
        raise ValueError(f"{node.op_type}: weight has shape {weight}, the attributes say [{words}]")


def _dims(kind: Any) -> list[Dim] | None:
    if kind is None or not kind.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in kind.shape.dim
    ]


def _may_be_equal(first: Sequence[Dim], second: Sequence[Dim]) -> bool:
    return len(first) == len(second) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(first, second, strict=True)
    )


def _linear_shape(node: SparseNode, x: list[Dim]) -> list[Dim]:
    n, k = node.shape
    if not x or not _may_be_equal(x[-1:], [k]):
        raise ValueError(f"{LINEAR}: x has shape {x}, expected [..., {k}]")
    return [*x[:-1], n]


def _conv2d_shape(node: SparseNode, x: list[Dim]) -> list[Dim]:
    window = node.window
    assert window is not None
    channels = window.channels * window.group
    if len(x) != 4 or not _may_be_equal(x[1:2], [channels]):
        raise ValueError(f"{CONV2D}: x has shape {x}, expected [N, {channels}, H, W]")
    geometry = (window.kernel_shape, window.strides, window.pads, window.dilations)
    size: list[Dim] = []
    for axis in range(2):
        length = x[2 + axis]
        if isinstance(length, int):
            size.append(conv2d_size([length, length], *geometry)[axis])
            if length < 1 or size[axis] < 1:  # type: ignore[operator]
                raise ValueError(f"{CONV2D}: x has shape {x}, which the kernel does not fit in")
        else:
            # A name stands for one number, and stays where the number does.
            kept = conv2d_size([64, 64], *geometry)[axis] == 64 and window.strides[axis] == 1
            size.append(length if kept else None)
    return [x[0], node.shape[0], *size]
