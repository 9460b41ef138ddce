"""A model as an ONNX graph in memory, in which our operators are still torch's.

Each call of `torch.ops.sparsekit.linear` and `conv2d` becomes a node of the domain `PACKED`, whose
weight is the packed bytes. Such nodes never reach a file: `sparsekit.export.calls` finds them, and
`lower` or `dense` replaces them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import ir, values
from torch import nn

from sparsekit import _ops
from sparsekit.export.nodes import CONV2D, LINEAR

PACKED = "sparsekit.packed"
# They announce every step, and torch functions that are about to change.
_CHATTY = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")

_INT, _INTS, _STRING = OpSchema.AttrType.INT, OpSchema.AttrType.INTS, OpSchema.AttrType.STRING
_EPILOGUE = {"activation": _STRING, "residual_first": _INT}
_ATTRIBUTES = {
    LINEAR: _EPILOGUE,
    CONV2D: {
        **_EPILOGUE,
        "kernel_shape": _INTS,
        "strides": _INTS,
        "pads": _INTS,
        "dilations": _INTS,
        "group": _INT,
        "channels": _INT,
    },
}


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset_version: int,
) -> ir.Model:
    """Export a model, in eval mode and without gradients; the modules' modes are kept."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                model,
                args,
                kwargs=dict(kwargs),
                dynamo=True,
                verbose=False,
                opset_version=opset_version,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table={_ops.linear: _linear, _ops.conv2d: _conv2d},
            )
    finally:
        for module, mode in modes:
            module.training = mode
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _op(name: str) -> values.Op:
    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    schema = OpSchema(
        name,
        PACKED,
        1,
        inputs=[
            parameter("x", "T"),
            parameter("packed", "tensor(uint8)"),
            parameter("bias", "T", param_option=option.Optional),
            parameter("residual", "T", param_option=option.Optional),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            OpSchema.Attribute(attribute, kind, "", required=True)
            for attribute, kind in _ATTRIBUTES[name].items()
        ],
    )
    return values.Op(values.Opset(PACKED, 1), name, schema)


_OPS = {name: _op(name) for name in _ATTRIBUTES}


# The exporter reads these signatures: what has an annotation becomes an attribute.
def _linear(  # type: ignore[no-untyped-def]
    x,
    packed,
    n: int,
    bias=None,
    activation: str | None = None,
    residual=None,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Any:
    return _OPS[LINEAR](x, packed, bias, residual, activation=activation or "", residual_first=0)


def _conv2d(  # type: ignore[no-untyped-def]
    x,
    packed,
    n: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tap: int,
    bias=None,
    activation: str | None = None,
    residual=None,
    residual_first: bool = False,
    kernel_id: str | None = None,
    header: Sequence[int] | None = None,
) -> Any:
    return _OPS[CONV2D](
        x,
        packed,
        bias,
        residual,
        activation=activation or "",
        residual_first=int(residual_first),
        kernel_shape=list(kernel_size),
        strides=list(stride),
        pads=list(padding),
        dilations=list(dilation),
        group=groups,
        channels=int(x.shape[1]) // groups,
    )
