"""One measured convolution: filters with a pattern, our kernel, checked, and its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import sparsekit as sk
from bench import peers
from bench.baselines import Call, Unavailable, conv_model, onnxruntime_call
from bench.case import Layer, Prepared
from bench.peers import Worker
from sparsekit import _native, testing
from sparsekit.workload import ConvWorkload


@dataclass(frozen=True)
class ConvLayer:
    """A square convolution whose padding keeps the size of images, but for the stride.

    Attributes:
        model: The model it belongs to.
        inputs: Cin.
        outputs: Cout.
        kernel: Height and width of the filters, odd.
        side: Height and width of the input images.
        stride: Of both dimensions.
    """

    model: str
    inputs: int
    outputs: int
    kernel: int
    side: int
    stride: int = 1

    @property
    def name(self) -> str:
        step = f"/{self.stride}" if self.stride > 1 else ""
        size = f"{self.kernel}x{self.kernel}{step}"
        return f"{size}-{self.inputs}-{self.outputs}-at-{self.side}"

    @property
    def k(self) -> int:
        return self.kernel * self.kernel * self.inputs

    @property
    def result_side(self) -> int:
        return -(-self.side // self.stride)


@dataclass(frozen=True)
class ConvCase:
    """What to measure."""

    layer: ConvLayer
    batch: int
    pattern: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = _native.DTYPE_NAMES[self.dtype]
        return f"{self.layer.name}-batch{self.batch}-{self.pattern}-{dtype}"

    @property
    def m(self) -> int:
        """Pixels of the result."""
        return self.batch * self.layer.result_side**2


# A run goes through the batch sizes and thread counts of a layer before it takes the next.
@lru_cache(maxsize=1)
def random_filters(layer: ConvLayer, pattern: str, dtype: torch.dtype) -> Layer:
    """A convolution whose filters follow a pattern."""
    generator = torch.Generator().manual_seed(0)
    shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    mask = sk.mask(torch.rand(shape, generator=generator), pattern)
    weight = torch.randn(shape, generator=generator).to(dtype).masked_fill_(~mask, 0)
    bias = torch.randn(layer.outputs, generator=generator).to(dtype)
    return Layer(weight, bias, sk.pack(weight, pattern, mask))


def _check(y: Tensor, x: Tensor, filters: Layer, layer: ConvLayer) -> None:
    """Holds a result to the package's tolerance rule.

    Raises:
        AssertionError: The result is wrong.
    """
    half = layer.kernel // 2
    problem = testing.ConvProblem(
        x=x,
        weight=filters.weight,
        mask=filters.weight != 0,
        bias=filters.bias,
        residual=y,  # of its shape; it is not added
        stride=(layer.stride, layer.stride),
        padding=(half, half, half, half),
        dilation=(1, 1),
        groups=1,
    )
    testing.assert_conv2d_close(y, problem, filters.bias)


def _onnxruntime(case: ConvCase, filters: Layer, x: Tensor, y: Tensor) -> Call:
    """On NCHW, the layout that its graphs have; it converts to one of its own and back."""
    if case.dtype != torch.float32:
        raise Unavailable("ONNX Runtime's CPU provider has no bfloat16 Conv")
    model = conv_model(filters.weight, filters.bias, case.layer.stride, x.shape, y.shape)
    return onnxruntime_call(model, x.contiguous(), torch.empty(y.shape))


def _deepsparse(worker: Worker, case: ConvCase, filters: Layer, x: Tensor, y: Tensor) -> Call:
    import onnx

    peers.only_f32("DeepSparse", filters.weight)
    path = worker.folder / "conv.onnx"
    model = conv_model(filters.weight, filters.bias, case.layer.stride, x.shape, y.shape)
    onnx.save(model, str(path))
    call = worker.load([x.contiguous()], torch.get_num_threads(), model=path)
    return peers.checked("DeepSparse", call, y)


def prepare(
    case: ConvCase, workers: Sequence[Worker] = (), every_isa: bool = True
) -> tuple[Prepared, ConvWorkload]:
    """Builds every path of a case and checks our result by the package's tolerance rule.

    Args:
        case: What to build.
        workers: DeepSparse, or nothing.
        every_isa: Include what cannot be limited to an older instruction set.

    Returns:
        The paths, and the case as `convert`'s gate knows it.

    Raises:
        AssertionError: Our result is wrong.
    """
    layer = case.layer
    filters = random_filters(layer, case.pattern, case.dtype)
    workload = ConvWorkload(
        filters.packed,
        (case.batch, layer.inputs, layer.side, layer.side),
        layer.stride,
        layer.kernel // 2,
        bias=filters.bias,
    )
    x = workload.input()
    with torch.inference_mode():
        ours = workload.sparse(x)
        y = ours()
        _check(y, x, filters, layer)
        dense = workload.dense_paths(x)
        sparse: dict[str, Call] = {}
        unavailable = {}
        if every_isa:
            try:
                dense["onnxruntime"] = _onnxruntime(case, filters, x, y)
            except Unavailable as reason:
                unavailable["onnxruntime"] = str(reason)
        for worker in workers:
            try:
                sparse[worker.engine] = _deepsparse(worker, case, filters, x, y)
            except Unavailable as reason:
                unavailable[worker.engine] = str(reason)
    return Prepared(workload.kernel, filters, ours, dense, sparse, unavailable), workload
