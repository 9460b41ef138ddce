"""Small convolutional networks of the kinds that matter, with statistics that do something."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekit as sk
from sparsekit.convert import ConvertReport
from sparsekit.nn import SparseConv1d, SparseConv2d


class BasicBlock(nn.Module):
    """A block of ResNet-18: the shortcut is added before the last activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.drop = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.down: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.drop(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.act2(y)


class ResNet(nn.Module):
    """A stem that pools, two stages, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn(self.stem(x))))
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: wide, depthwise, narrow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = nn.ReLU6()
        self.depth = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.act2 = nn.ReLU6()
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.depth(y)))
        return x + self.bn3(self.project(y))


class MobileNet(nn.Module):
    """Two inverted residuals behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.blocks = nn.Sequential(InvertedResidual(16), InvertedResidual(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Unit(nn.Module):
    """Convolution, normalisation, SiLU, as detectors have it."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    """YOLO's block: split, bottlenecks with shortcuts, everything concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = Unit(channels, channels)
        self.inner = nn.ModuleList([Unit(half, half, 3), Unit(half, half, 3)])
        self.last = Unit(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for unit in self.inner:
            parts.append(parts[-1] + unit(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A backbone, a neck that upsamples, a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 16, 3, 2)
        self.block = C2f(16)
        self.down = Unit(16, 32, 3, 2)
        self.neck = Unit(48, 16)
        self.head = nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.block(self.stem(x))
        far = functional.interpolate(self.down(near), scale_factor=2.0)
        return self.head(self.neck(torch.cat((near, far), 1)))


class Audio(nn.Module):
    """1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(8, 16, 5, 2, 2, bias=False),
            nn.BatchNorm1d(16),
            nn.GELU(),
            nn.Conv1d(16, 16, 3, padding=2, dilation=2, padding_mode="circular"),
            nn.BatchNorm1d(16),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(-1)


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))

NETWORKS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "resnet": (ResNet, IMAGE),
    "mobilenet": (MobileNet, IMAGE),
    "yolo": (Yolo, IMAGE),
    "audio": (Audio, SOUND),
}


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and factors for every batch normalisation."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        known = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if known and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.2, generator=generator)
    return model


def prune(model: nn.Module, pattern: str = "2:4") -> nn.Module:
    """Zeros by magnitude in every layer that can be sparse."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module.weight.shape[1] > 1:
            module.weight.data *= sk.mask(module.weight, pattern)
    return model


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A pruned network in eval mode, and an input."""
    kind, x = NETWORKS[name]
    torch.manual_seed(0)
    return prune(shake(kind())).eval(), x


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes in float64, rounded once."""
    return run(copy.deepcopy(model).double(), x.double()).to(x.dtype)


def always(model: nn.Module, x: Any, pattern: Any = "2:4", **options: Any) -> ConvertReport:
    """`convert` without measuring."""
    return sk.convert(model, pattern, x, gate="always", progress=False, **options)


def formats(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """For each convolution whether it gets its channels side by side."""
    seen: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].stride(1) == 1

        return hook

    kinds = (nn.Conv2d, nn.Conv1d, SparseConv2d, SparseConv1d)
    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    run(model, x)
    for handle in handles:
        handle.remove()
    return seen
