"""`SparseLinear` as a quick plugin of TensorRT: its kernel becomes part of the engine.

Such an engine needs no library of ours. What that costs is in docs/onnx.md. The kernels are PTX,
data of this package made from `csrc/cuda/quick/`; their parameters are pointers to x and weight, m
and the integers of `_integers`, and a pointer to y.
"""

# No `from __future__ import annotations`: TensorRT reads the annotations of what it registers.

import functools
import importlib
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekit import _native
from sparsekit.export.nodes import CANONICAL, DOMAIN, LINEAR, QUICK
from sparsekit.patterns import NM

MINIMUM = (10, 9)

# Shared memory of every kernel, kQuickSharedBytes.
SHARED_BYTES = 32 << 10
# By TensorRT's tactic, of which it takes the faster one: what a block computes at a time, rows of W
# and tokens. They decide the grid, and any grid gives the same result.
_KERNELS = {1: ("decode", 8, 8), 2: ("tiles", 64, 32)}
_DTYPES = {code: dtype for dtype, code in _native.DTYPES.items()}
# TensorRT's name and ours.
_TYPES = {
    torch.float32: ("FP32", "f32"),
    torch.float16: ("FP16", "f16"),
    torch.bfloat16: ("BF16", "bf16"),
}


def rewrite(model: Any) -> list[str]:
    """Turn nodes `SparseLinear` into `SparseLinearQuick` where one kernel computes them.

    These are the N:M ones whose weight is canonical and that have no residual; the others still
    need the plugin library.

    Args:
        model: an `onnx.ModelProto`, changed in place.

    Returns:
        The names of the nodes that were turned.
    """
    from onnx import helper

    turned = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, LINEAR):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        nm = attributes["pattern"][0] == 0
        residual = len(node.input) > 2 and node.input[2] != ""
        if not nm or attributes["format"] != CANONICAL.encode() or residual:
            continue
        node.op_type = QUICK
        del node.input[2:]
        node.attribute.append(helper.make_attribute("aot", 1))
        turned.append(node.name)
    return turned


def register_quick_plugins() -> None:
    """Make `SparseLinearQuick` known to TensorRT's Python package, which parses and builds.

    What runs the engine needs nothing. Calling it again does nothing.

    Raises:
        ImportError: TensorRT's Python package is missing, or older than 10.9.
        NotImplementedError: this build has no CUDA kernels.
    """
    _require_tensorrt()
    for dtype in _TYPES:
        for tactic in _KERNELS:
            ptx(kernel_name(dtype, tactic))
    _register()


def kernel_name(dtype: torch.dtype, tactic: int) -> str:
    """Of a tactic of TensorRT: 1 for few tokens, 2 for many."""
    return f"sparsekit_linear_nm_{_TYPES[dtype][1]}_{_KERNELS[tactic][0]}"


@functools.cache
def ptx(kernel: str) -> str:
    """The code of a kernel.

    Raises:
        NotImplementedError: this build has no CUDA kernels.
    """
    path = _native.ptx_folder() / f"{kernel}.ptx"
    if not path.is_file():
        raise NotImplementedError(
            f"register_quick_plugins: {path} is missing; this build has no CUDA kernels, rebuild "
            "with nvcc and SPARSEKIT_CUDA=ON"
        )
    return path.read_text()


def threads(kernel: str) -> int:
    """Of a block: what the kernel was compiled for."""
    found = re.search(r"^\.maxntid (\d+)", ptx(kernel), re.MULTILINE)
    assert found is not None
    return int(found[1])


def blocks(tactic: int, n: int, m: Any, cdiv: Any) -> Any:
    """The grid for m tokens, an integer or TensorRT's expression of one."""
    _, rows, tokens = _KERNELS[tactic]
    return cdiv(m, tokens) * -(-n // rows)


def _integers(
    n: int,
    k: int,
    pattern: NM,
    dtype: torch.dtype,
    has_bias: bool,
    activation: int,
    words: int | None,
) -> tuple[int, ...]:
    """The kernels' integers after m. Sections of the weight are counted in 16 bytes.

    Args:
        words: int32 numbers of the weight; None where that is not known.

    Raises:
        ValueError: the weight has another length than its description.
    """
    values, indices, _ = _native.canonical_sizes(pattern, dtype, (n, k), 0)
    at_indices = -(-values // 16)
    at_bias = at_indices + -(-indices // 16)
    size = 16 * at_bias + n * dtype.itemsize if has_bias else 16 * at_indices + indices
    expected = -(-size // 4)
    if words is not None and words != expected:
        raise ValueError(
            f"SparseLinearQuick: expected a weight of {expected} int32 numbers for {pattern} in "
            f"{dtype} with n={n}, k={k}, got {words}; export the model again"
        )
    numbers = (pattern.n, pattern.m, pattern.vector, at_indices, at_bias if has_bias else 0)
    return (n, k, *numbers, activation)


def _require_tensorrt() -> None:
    wanted = ".".join(map(str, MINIMUM))
    advice = f"register_quick_plugins: needs TensorRT {wanted} or later with its Python package"
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        raise ImportError(
            f"{advice}, which cannot be imported ({error}); pip install tensorrt"
        ) from error
    if tuple(map(int, version.split(".")[:2])) < MINIMUM:
        raise ImportError(
            f"{advice}, got {version}; use the plugin library libsparsekit_tensorrt.so instead"
        )


@functools.cache
def _register() -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    plugin = f"{DOMAIN}::{QUICK}"
    types = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
    }

    @trtp.register(plugin)
    def describe(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        n: int,
        k: int,
        pattern: NDArray[np.int32],
        dtype: int,
        has_bias: int,
        activation: int,
    ) -> trtp.TensorDesc:
        columns = x.shape_expr[-1]
        if not columns.is_fake and columns.is_constant and columns.constant_value() != k:
            raise ValueError(
                f"SparseLinearQuick: x has k={columns.constant_value()}, the weight has k={k}"
            )
        if types.get(x.dtype) != _DTYPES[dtype]:
            raise ValueError(
                f"SparseLinearQuick: x is {x.dtype}, the weight {_DTYPES[dtype]}; export the model "
                "again"
            )
        y = x.like()
        y.shape_expr = trtp.ShapeExprs.from_tuple((*list(x.shape_expr)[:-1], n))
        return y

    @trtp.autotune(plugin)
    def combinations(
        x: trtp.TensorDesc, weight: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        name = _TYPES[types[x.dtype]][0]
        return [trtp.AutoTuneCombination(f"{name}, INT32, {name}", "LINEAR", list(_KERNELS))]

    @trtp.aot_impl(plugin)
    def kernel(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        n: int,
        k: int,
        pattern: NDArray[np.int32],
        dtype: int,
        has_bias: int,
        activation: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        _, kept, group, vector, *_ = (int(number) for number in pattern)
        words = weight.shape_expr[0]
        integers = _integers(
            n,
            k,
            NM(kept, group, vector=vector),
            _DTYPES[dtype],
            bool(has_bias),
            activation,
            words.constant_value() if words.is_constant else None,
        )
        m = trtp.ShapeExpr(1)
        for size in list(x.shape_expr)[:-1]:
            m = m * size
        name = kernel_name(_DTYPES[dtype], tactic)
        launch = trtp.KernelLaunchParams()
        # No tokens need a grid, too.
        launch.grid_x = trtp.max(blocks(tactic, n, m, trtp.cdiv), 1)
        launch.block_x = threads(name)
        launch.shared_mem = SHARED_BYTES
        extra = trtp.SymIntExprs(1 + len(integers))
        for i, number in enumerate((m, *integers)):
            extra[i] = trtp.SymInt32(number)
        return name, ptx(name), launch, extra
