"""Calls of our operators become plain ONNX with the zeros in place, in floating point or int8.

For comparison with engines that know no node of ours, and for TensorRT's own 2:4 kernels, which it
looks for in constant weights when it builds with `--sparsity=enable`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import ir
from torch import Tensor

from sparsekit import _native
from sparsekit.export.calls import Call, Constants, finish, replace
from sparsekit.export.report import ExportRow, row_of
from sparsekit.filters import FilterShape, to_filters

_GELU_OPSET = 20
# The first whose QuantizeLinear takes the 2-byte types.
_QUANTIZE_OPSET = 19
_INT8_MAX = 127


def to_dense(
    model: ir.Model,
    calls: Sequence[Call],
    ranges: Mapping[str, float] | None,
    step: Callable[[], object],
) -> list[ExportRow]:
    """Replace each call by plain nodes, in place.

    Args:
        model: traced.
        calls: all of it.
        ranges: for int8 the largest magnitude in the input of each layer, by its name.
        step: called after each.

    Returns:
        What was written for each call.

    Raises:
        ValueError: int8 for a 2-byte type in an opset that lacks it.
    """
    writer = _Writer(model)
    rows = []
    for call in calls:
        rows.append(writer.write(call, None if ranges is None else ranges[call.layer]))
        step()
    finish(model, calls, ours=False)
    return rows


class _Writer:
    """Writes calls; constants and quantised inputs that several need are written once."""

    def __init__(self, model: ir.Model) -> None:
        self._opset = model.opset_imports[""]
        self._constants = Constants(model)
        self._nodes: list[ir.Node] = []
        self._made: dict[Any, ir.Value] = {}

    def write(self, call: Call, largest: float | None) -> ExportRow:
        """Put plain nodes in the place of a call.

        Args:
            largest: the largest magnitude in its input for int8; None for floating point.
        """
        self._nodes = []
        canonical = call.canonical()
        dtype, x = canonical.dtype, call.x
        if largest is None:
            stored = weight = self._once(
                ("weight", *call.constants),
                lambda: self._constant(call, "weight", _stored(call, _weight(call, canonical))),
            )
        else:
            self._check_quantizable(dtype)
            # Layers that read one value share its int8 form.
            key = ("x", id(call.node.graph), x, largest)
            x = self._once(key, lambda: self._quantized(call, largest, dtype))
            stored, weight = self._quantized_weight(call, canonical)
        y = self._product(call, x, weight)
        y = self._epilogue(call, y, dtype)
        row = row_of(
            call,
            "MatMul" if call.window is None else "Conv",
            canonical.pattern,
            dtype if largest is None else torch.int8,
            "dense",
            stored,
        )
        replace(call, self._nodes, y)
        return row

    def _product(self, call: Call, x: ir.Value, weight: ir.Value) -> ir.Value:
        window = call.window
        if window is None:
            return self._op("MatMul", x, weight)
        bias = call.constants[1]
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self._op(
            "Conv",
            *inputs,
            kernel_shape=window.kernel_shape,
            strides=window.strides,
            pads=window.pads,
            dilations=window.dilations,
            group=window.group,
        )

    def _epilogue(self, call: Call, y: ir.Value, dtype: torch.dtype) -> ir.Value:
        bias = call.constants[1]
        if call.window is None and bias is not None:
            y = self._op("Add", y, bias)
        if call.residual is not None and call.residual_first:
            y = self._op("Add", y, call.residual)
        y = self._activated(y, call.activation, dtype)
        if call.residual is not None and not call.residual_first:
            y = self._op("Add", y, call.residual)
        return y

    def _activated(self, y: ir.Value, activation: str | None, dtype: torch.dtype) -> ir.Value:
        def number(value: float) -> ir.Value:
            return self._scalar(value, dtype)

        if activation is None:
            return y
        if activation == "relu":
            return self._op("Relu", y)
        if activation == "relu6":
            return self._op("Clip", y, number(0), number(6))
        if activation == "silu":
            return self._op("Mul", y, self._op("Sigmoid", y))
        tanh = activation == "gelu_tanh"
        if self._opset >= _GELU_OPSET:
            return self._op("Gelu", y, approximate="tanh" if tanh else "none")
        if tanh:
            cube = self._op("Mul", self._op("Mul", y, y), y)
            inner = self._op("Add", y, self._op("Mul", cube, number(0.044715)))
            inner = self._op("Tanh", self._op("Mul", inner, number(math.sqrt(2 / math.pi))))
        else:
            inner = self._op("Erf", self._op("Mul", y, number(math.sqrt(0.5))))
        half = self._op("Mul", y, number(0.5))
        return self._op("Mul", half, self._op("Add", inner, number(1)))

    # --- int8 ---

    def _check_quantizable(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32 and self._opset < _QUANTIZE_OPSET:
            raise ValueError(
                f"export: int8 for {str(dtype).removeprefix('torch.')} needs "
                f"opset_version={_QUANTIZE_OPSET} or later, got {self._opset}"
            )

    def _quantized(self, call: Call, largest: float, dtype: torch.dtype) -> ir.Value:
        scale = self._constant(call, "input_scale", _scale(torch.tensor(largest), dtype))
        zero = self._zero_point(torch.zeros((), dtype=torch.int8))
        return self._op(
            "DequantizeLinear", self._op("QuantizeLinear", call.x, scale, zero), scale, zero
        )

    def _quantized_weight(
        self, call: Call, canonical: _native.Canonical
    ) -> tuple[ir.Value, ir.Value]:
        """The int8 constant, and what stands for its numbers."""
        weight = _weight(call, canonical).float()
        scale = _scale(weight.abs().flatten(1).amax(1), canonical.dtype)
        by_row = scale.float().view(-1, *[1] * (weight.dim() - 1))
        # To the nearest; what was zero is zero.
        numbers = (weight / by_row).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)

        def constant(name: str, tensor: Tensor) -> ir.Value:
            return self._once((name, *call.constants), lambda: self._constant(call, name, tensor))

        stored = constant("weight", _stored(call, numbers))
        scales = constant("weight_scale", scale)
        zeros = self._zero_point(torch.zeros(len(scale), dtype=torch.int8))
        axis = 1 if call.window is None else 0
        return stored, self._op("DequantizeLinear", stored, scales, zeros, axis=axis)

    # --- nodes and constants ---

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self._nodes.append(node)
        return node.outputs[0]

    def _once(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _constant(self, call: Call, name: str, tensor: Tensor) -> ir.Value:
        return self._named(f"{call.layer}.{name}", tensor)

    def _named(self, name: str, tensor: Tensor) -> ir.Value:
        return self._constants.add(name, ir.tensor(tensor.contiguous()))

    def _scalar(self, value: float, dtype: torch.dtype) -> ir.Value:
        name = f"{value:g}_{str(dtype).removeprefix('torch.')}"
        return self._once(name, lambda: self._named(name, torch.tensor(value, dtype=dtype)))

    def _zero_point(self, zeros: Tensor) -> ir.Value:
        key = ("zero_point", tuple(zeros.shape))
        return self._once(key, lambda: self._named("zero_point", zeros))


def _weight(call: Call, canonical: _native.Canonical) -> Tensor:
    """`[n, k]`, or the filters of a convolution."""
    matrix = _native.decompress(canonical)
    window = call.window
    if window is None:
        return matrix
    shape = FilterShape(canonical.shape[0], window.channels, window.kernel_shape, window.group)
    return to_filters(matrix, shape)


def _stored(call: Call, weight: Tensor) -> Tensor:
    """The weight as the node reads it: of a MatMul transposed."""
    return weight.t() if call.window is None else weight


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What one step of int8 is, so that the largest magnitude is the last; 1 where all is zero."""
    scale = torch.where(largest > 0, largest / _INT8_MAX, torch.ones_like(largest))
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)
