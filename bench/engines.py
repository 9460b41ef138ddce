"""TensorRT engines of one network: dense, with TensorRT's own sparsity, and with our plugin.

Needs TensorRT's Python package and a GPU. `bench/test_tensorrt.py` measures them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekit as sk
from bench.baselines import Unavailable


@dataclass(frozen=True)
class Variant:
    """One way to run a pruned network.

    Attributes:
        options: of `sparsekit.export.onnx`.
        sparse_weights: TensorRT may choose its own kernels for 2:4.
        plugin: the network has nodes of our plugin.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sparse_weights: bool = False
    plugin: bool = False


_DENSE = {"dense": True}
_INT8 = {"dense": True, "quantize": "int8"}
DENSE = Variant("TensorRT dense", _DENSE)
OURS = Variant("sparsekit", plugin=True)
VARIANTS = (
    DENSE,
    Variant("TensorRT sparse", _DENSE, sparse_weights=True),
    Variant("TensorRT int8", _INT8),
    Variant("TensorRT int8 sparse", _INT8, sparse_weights=True),
    OURS,
)


def import_tensorrt() -> Any:
    """The `tensorrt` package.

    Raises:
        Unavailable: it is not installed, or no GPU is there to build an engine for.
    """
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise Unavailable(f"TensorRT's Python package cannot be imported: {error}") from None
    if not torch.cuda.is_available():
        raise Unavailable("torch finds no GPU")
    return tensorrt


def load_plugin(tensorrt: Any) -> None:
    """Makes our layers known to TensorRT; once is enough for a process.

    Raises:
        Unavailable: this build has no plugin.
        RuntimeError: TensorRT did not take it; its log says why.
    """
    try:
        path = sk.export.plugin_path()
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from None
    registry = tensorrt.get_plugin_registry()
    if registry.get_creator("SparseLinear", "1", "sparsekit") is not None:
        return
    if registry.load_library(str(path)) is None:
        raise RuntimeError(f"TensorRT {tensorrt.__version__} did not load {path}")


def build(
    tensorrt: Any,
    model: nn.Module,
    inputs: Sequence[Tensor],
    variant: Variant,
    folder: Path,
) -> bytes:
    """Exports a converted network and builds an engine for inputs of these sizes.

    Args:
        inputs: what the network takes, on its device.
        folder: receives the ONNX file.

    Returns:
        The serialised engine.

    Raises:
        RuntimeError: TensorRT reads or builds the network not; its errors are in the message.
    """
    path = folder / f"{variant.name.replace(' ', '-')}.onnx"
    sk.export.onnx(model, tuple(inputs), path, **variant.options)
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # Types are those of the file: the same in TensorRT 10, and all there is in 11.
    strongly = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT does not read {path}: {errors}")
    config = builder.create_builder_config()
    if variant.sparse_weights:
        config.set_flag(tensorrt.BuilderFlag.SPARSE_WEIGHTS)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT built no engine of {path}; its log says why")
    return bytes(plan)


class Engine:
    """An engine with its tensors, captured into a CUDA graph: a call is one launch.

    Args:
        plan: from `build`.
        inputs: copied; on the GPU that the engine is for.
    """

    def __init__(self, tensorrt: Any, plan: bytes, inputs: Sequence[Tensor]) -> None:
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {
            name: self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT
            for name in names
        }
        given = [name for name in names if is_input[name]]
        if len(given) != len(inputs):
            raise ValueError(f"the engine has the inputs {given}, got {len(inputs)} tensors")
        self._tensors = dict(zip(given, (x.contiguous().clone() for x in inputs), strict=True))
        self.outputs: list[Tensor] = []
        for name in (name for name in names if not is_input[name]):
            dtype = _dtype(tensorrt, self._engine.get_tensor_dtype(name))
            shape = tuple(self._context.get_tensor_shape(name))
            self.outputs.append(torch.empty(shape, dtype=dtype, device=inputs[0].device))
            self._tensors[name] = self.outputs[-1]
        for name, tensor in self._tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        # The first run prepares the weights of sparse layers; a capture comes after it.
        self._enqueue()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._enqueue()

    def __call__(self) -> list[Tensor]:
        """Runs the engine and waits for it; the outputs are overwritten by the next call."""
        self._graph.replay()
        torch.cuda.synchronize()
        return self.outputs

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("the engine did not run; TensorRT's log says why")


def _dtype(tensorrt: Any, dtype: Any) -> torch.dtype:
    known = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    kind: torch.dtype = getattr(torch, known.get(dtype.name, dtype.name.lower()))
    return kind
