"""Our nodes for ONNX's reference evaluator: they run this library's own kernels.

Only what is in the file is used, so a model's numbers come out of it bit for bit where this CPU
also ran the model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from torch import Tensor

from sparsekit import _native, _ops
from sparsekit.export.nodes import CONV2D, DOMAIN, LINEAR, SparseNode
from sparsekit.export.weights import decode
from sparsekit.pack import PackedWeight

Array = NDArray[Any]


class _Layer:
    """A node's attributes with its weight, packed for this CPU."""

    def __init__(self, op_type: str, attributes: dict[str, Any], weight: Array) -> None:
        self.node = SparseNode.parse(op_type, attributes)
        if weight.dtype != np.int32:
            raise ValueError(f"{op_type}: expected weight as int32, got {weight.dtype}")
        canonical, self.bias = decode(self.node, _torch(weight))
        self.packed = PackedWeight.from_canonical(canonical, filters=self.node.filters)

    def operand(self, name: str, array: Array, shape: list[int | str]) -> Tensor:
        """An input as a tensor, refused if it is not of the layer's dtype and of this shape."""
        node = self.node
        if not _is(array.dtype, node.dtype):
            expected = str(node.dtype).removeprefix("torch.")
            raise ValueError(f"{node.op_type}: {name} is {array.dtype}, dtype says {expected}")
        fits = len(array.shape) == len(shape) and all(
            isinstance(want, str) or have == want
            for have, want in zip(array.shape, shape, strict=True)
        )
        if not fits:
            sizes = ", ".join(map(str, shape))
            raise ValueError(
                f"{node.op_type}: {name} has shape {list(array.shape)}, expected [{sizes}]"
            )
        tensor = _torch(array)
        return tensor if tensor.dtype == node.dtype else tensor.view(node.dtype)


def _is(dtype: np.dtype[Any], expected: torch.dtype) -> bool:
    if expected == torch.bfloat16:
        # Before ml_dtypes ONNX had a type of its own for it.
        own = dtype.itemsize == 2 and (dtype.descr[0][0] == "bfloat16")
        return bool(dtype == ml_dtypes.bfloat16 or own)
    return bool(dtype == (np.float32 if expected == torch.float32 else np.float16))


def _torch(array: Array) -> Tensor:
    """An array as a contiguous tensor; bfloat16, which numpy does not have, as its bits."""
    known = array.dtype in (np.float32, np.float16, np.int32)
    array = array if known else array.view(np.int16)
    return torch.from_numpy(np.require(array, requirements=("C", "W")).reshape(array.shape))


def _numpy(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.numpy().view(dtype)


class _SparseOp(OpRun):
    op_domain = DOMAIN

    _node: ClassVar[str]
    _made: tuple[Array, _Layer] | None = None

    def _layer(self, weight: Array, attributes: dict[str, Any]) -> _Layer:
        # The evaluator makes one of these objects for each node and passes it the same array.
        if self._made is None or self._made[0] is not weight:
            self._made = weight, _Layer(self._node, attributes, weight)
        return self._made[1]


class SparseLinear(_SparseOp):
    """The node of this name."""

    _node = LINEAR

    def _run(
        self, x: Array, weight: Array, residual: Array | None = None, **attributes: Any
    ) -> tuple[Array]:
        layer = self._layer(weight, attributes)
        node = layer.node
        n, k = node.shape
        rows = layer.operand("x", x, [*map(str, x.shape[:-1]), k])
        y = rows.new_empty(*rows.shape[:-1], n)
        added = None if residual is None else layer.operand("residual", residual, list(y.shape))
        _native.matmul(
            rows.reshape(-1, k),
            layer.packed.data,
            y.view(-1, n),
            layer.bias,
            node.activation,
            None if added is None else added.reshape(-1, n),
            node.residual_first,
        )
        return (_numpy(y, x.dtype),)


class SparseLinearQuick(SparseLinear):
    """The node of this name: SparseLinear for another kernel."""

    def _run(
        self,
        x: Array,
        weight: Array,
        residual: Array | None = None,
        *,
        aot: int | None = None,
        **attributes: Any,
    ) -> tuple[Array]:
        return super()._run(x, weight, residual, **attributes)


class SparseConv2d(_SparseOp):
    """The node of this name."""

    _node = CONV2D

    def _run(
        self, x: Array, weight: Array, residual: Array | None = None, **attributes: Any
    ) -> tuple[Array]:
        layer = self._layer(weight, attributes)
        node, window = layer.node, layer.node.window
        assert window is not None
        images = layer.operand("x", x, ["N", window.channels * window.group, "H", "W"])
        geometry = (window.kernel_shape, window.strides, window.pads, window.dilations)
        size = _ops.conv2d_size(images.shape[2:], *geometry)
        if min(*size, *images.shape[2:]) < 1:
            raise ValueError(
                f"{CONV2D}: x has shape {list(x.shape)}, which the kernel does not fit in"
            )
        n, k = node.shape
        shape = [images.shape[0], n, *size]
        added = None if residual is None else layer.operand("residual", residual, list(shape))
        y = _ops.conv2d_direct(
            images,
            layer.packed.data,
            n,
            *geometry,
            window.group,
            k // (window.kernel_shape[0] * window.kernel_shape[1]),
            layer.bias,
            node.activation,
            added,
            node.residual_first,
        )
        return (_numpy(y.contiguous(), x.dtype),)


assert (SparseLinear.__name__, SparseConv2d.__name__) == (LINEAR, CONV2D)
