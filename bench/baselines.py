"""What a user could run instead of sparsekit, prepared as well as that path allows.

Each builder takes `weight [n, k]`, `bias [n]` and the input `x [m, k]` and returns a call without
arguments that gives `y [m, n]`, or raises `Unavailable` with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.workload import dense_paths

Call = Callable[[], Tensor]


class Unavailable(RuntimeError):
    """This path cannot run this problem; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """One path: its name, whether it multiplies with the dense matrix, and its builder.

    Attributes:
        every_isa: It can be limited to an older instruction set, see `bench/isa.py`.
    """

    name: str
    dense: bool
    build: Callable[[Tensor, Tensor, Tensor], Call]
    every_isa: bool = True


def _torch_path(name: str, weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    """The paths `convert` measures against."""
    paths = dense_paths(weight, bias, None, x)
    if name not in paths:
        raise Unavailable(f"this torch has no {name} for {weight.dtype} on this CPU")
    return paths[name]


def gemm_model(weight: Tensor, bias: Tensor, m: int) -> Any:
    """An ONNX graph of one Gemm, `x [m, k]` to `y [m, n]`; old enough for every engine here."""
    from onnx import helper

    n, k = weight.shape
    node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])
    return _model_of(node, weight.t(), bias, [m, k], [m, n])


def conv_model(
    weight: Tensor, bias: Tensor, stride: int, x: Sequence[int], y: Sequence[int]
) -> Any:
    """An ONNX graph of one Conv whose padding keeps the size of images, but for the stride.

    Args:
        weight: `[Cout, Cin, height, width]`, of odd sizes.
        bias: `[Cout]`.
        stride: Of both dimensions.
        x: The input's shape.
        y: The result's.
    """
    from onnx import helper

    sides = [size // 2 for size in weight.shape[2:]]
    node = helper.make_node(
        "Conv", ["x", "weight", "bias"], ["y"], strides=[stride, stride], pads=sides * 2
    )
    return _model_of(node, weight, bias, x, y)


def _model_of(node: Any, weight: Tensor, bias: Tensor, x: Sequence[int], y: Sequence[int]) -> Any:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(y))],
        [
            numpy_helper.from_array(weight.contiguous().numpy(), "weight"),
            numpy_helper.from_array(bias.numpy(), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _onnxruntime(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    if weight.dtype != torch.float32:
        raise Unavailable("ONNX Runtime's CPU provider has no bfloat16 Gemm")
    m, n = x.shape[0], weight.shape[0]
    return onnxruntime_call(gemm_model(weight, bias, m), x, torch.empty(m, n))


def onnxruntime_call(model: Any, x: Tensor, y: Tensor) -> Call:
    """A graph of one operation, with input and output bound once so that nothing is copied.

    Args:
        model: Takes `x`, gives `y`.
        x: float32.
        y: Contiguous, for the result.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise spin into the next rival's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.contiguous().numpy())
    binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def _torch_sparse(
    compress: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor, x: Tensor
) -> Call:
    if weight.dtype != torch.float32:
        raise Unavailable("torch's sparse CPU matmul (MKL) has no bfloat16")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta state")
            sparse = compress(weight)
        columns = bias.unsqueeze(1).expand(-1, x.shape[0]).contiguous()
        call: Call = lambda: torch.addmm(columns, sparse, x.t()).t()  # noqa: E731
        call()
    except (NotImplementedError, RuntimeError) as error:
        raise Unavailable(str(error).splitlines()[0]) from error
    return call


BASELINES = (
    Baseline("torch", True, partial(_torch_path, "torch")),
    Baseline("oneDNN", True, partial(_torch_path, "oneDNN")),
    Baseline("onnxruntime", True, _onnxruntime, every_isa=False),
    Baseline("torch-csr", False, partial(_torch_sparse, Tensor.to_sparse_csr)),
    Baseline(
        "torch-bsr16x16",
        False,
        partial(_torch_sparse, partial(Tensor.to_sparse_bsr, blocksize=(16, 16))),
    ),
)
