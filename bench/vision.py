"""Networks of convolutions: the engines that run them, and timm without a working torchvision."""

from __future__ import annotations

import importlib
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.demo import latency
from sparsekit.demo.latency import Engine, Inputs

# The operators stay declared as long as this lives.
_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Imports torchvision, declaring its operators where its native library cannot be loaded.

    timm needs torchvision's Python code, which cannot be imported where that library was built for
    another torch (a CUDA wheel beside a CPU torch): the operators are missing that it describes.
    Declaring them is enough, since no model calls them.
    """
    found: object = sys.modules.get("torchvision", torch)
    if found is None:
        del sys.modules["torchvision"]  # hidden from transformers, which has looked by now
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # A module that failed half way is forgotten.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def import_timm() -> Any:
    """timm, whatever torchvision is installed."""
    import_torchvision()
    return importlib.import_module("timm")


def channels_last(model: nn.Module) -> nn.Module:
    """A copy whose filters lie in NHWC, so that its convolutions compute in that format."""
    return deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def in_channels_last(engine: Engine) -> Engine:
    """An engine that is given its images in NHWC; converting them is not timed."""

    def build(inputs: Inputs, folder: Path) -> latency.Run:
        images = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
        return engine.build(images, folder)

    return replace(engine, name=f"{engine.name}, channels_last", build=build)


class PrepackedConv2d(nn.Module):
    """A convolution whose weight oneDNN keeps in a layout of its own.

    What `torch.utils.mkldnn` makes of a convolution gives NCHW back, a conversion for each layer;
    this is the operation that a frozen, compiled graph calls.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise latency.Unavailable("oneDNN's convolution pads with given numbers of zeros alone")
        self._weight = conv.weight.to(dtype)
        self._bias = None if conv.bias is None else conv.bias.to(dtype)
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        # By the size of the input, since oneDNN's choice depends on it.
        self._packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.mkldnn
        if x.shape not in self._packed:
            self._packed[x.shape] = ops._reorder_convolution_weight(
                self._weight, *self._geometry, list(x.shape)
            )
        return ops._convolution_pointwise(
            x, self._packed[x.shape], self._bias, *self._geometry, "none", [], ""
        )


def _prepacked(model: nn.Module, dtype: torch.dtype) -> Engine:
    def build(inputs: Inputs, folder: Path) -> latency.Run:
        if not torch.backends.mkldnn.is_available():
            raise latency.Unavailable("this torch was built without oneDNN")
        copy = deepcopy(model).to(dtype)
        for name, child in list(copy.named_modules()):
            if isinstance(child, nn.Conv2d):
                copy.set_submodule(name, PrepackedConv2d(child, dtype))
        return lambda: copy(*inputs)

    return Engine(f"torch oneDNN {str(dtype).removeprefix('torch.')}", False, build)


def dense_engines(model: nn.Module, dtype: torch.dtype, compile_models: bool) -> list[Engine]:
    """As `latency.dense_engines`, torch's in both memory formats.

    Left out is what concerns Linear layers alone: oneDNN's modules and graphs of free sizes.
    """
    last = channels_last(model)

    def wanted(engine: Engine) -> bool:
        return "oneDNN" not in engine.name and not engine.name.endswith("dynamic")

    given = filter(wanted, latency.dense_engines(model, dtype, compile_models))
    again = filter(wanted, latency.dense_engines(last, dtype, compile_models))
    dtypes = dict.fromkeys((torch.float32, dtype))
    return [
        *given,
        *(in_channels_last(each) for each in again if each.name.startswith("torch")),
        *(in_channels_last(_prepacked(last, each)) for each in dtypes),
    ]


def sparse_engines(sparse: nn.Module, dtype: torch.dtype, compile_models: bool) -> list[Engine]:
    """As `latency.sparse_engines`, in NHWC, which sparse convolutions compute in."""
    return [
        in_channels_last(each) for each in latency.sparse_engines(sparse, dtype, compile_models)
    ]
