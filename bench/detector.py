"""A detector of one shot in the sizes of a phone's: what a sparse convolution meets beside ResNets.

A backbone of five halvings, pooling at several widths at its end, a neck that mixes three scales
downwards and upwards, and a head on each. Blocks split their channels, so that concatenations and
residual adds stand between the convolutions. The weights are random.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 80
_BOX = 4


class ConvUnit(nn.Module):
    """Convolution, batch normalisation, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with or without a residual add around them."""

    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.first = ConvUnit(channels, channels, 3)
        self.second = ConvUnit(channels, channels, 3)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.add else y


class SplitBlock(nn.Module):
    """Half of the channels goes through bottlenecks; every step's result is kept and mixed."""

    def __init__(self, inputs: int, outputs: int, depth: int, add: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.enter = ConvUnit(inputs, outputs)
        self.steps = nn.ModuleList(Bottleneck(half, add) for _ in range(depth))
        self.mix = ConvUnit((2 + depth) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(step(parts[-1]))
        return self.mix(torch.cat(parts, 1))


class PooledContext(nn.Module):
    """The neighbourhood at four widths, by pooling what was pooled already."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = ConvUnit(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.mix = ConvUnit(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        widths = [self.enter(x)]
        for _ in range(3):
            widths.append(self.pool(widths[-1]))
        return self.mix(torch.cat(widths, 1))


class Head(nn.Module):
    """Box and class scores at every pixel of one scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvUnit(channels, CLASSES, 3)
        self.second = ConvUnit(CLASSES, CLASSES, 3)
        self.predict = nn.Conv2d(CLASSES, _BOX + CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(self.second(self.first(x)))


class Detector(nn.Module):
    """Images `[N, 3, H, W]`, H and W multiples of 32, to raw scores of three scales.

    The result is `[N, 84, pixels]`, the scales one after the other, finest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvUnit(3, 16, 3, 2)
        self.stage2 = nn.Sequential(ConvUnit(16, 32, 3, 2), SplitBlock(32, 32, 1, add=True))
        self.stage3 = nn.Sequential(ConvUnit(32, 64, 3, 2), SplitBlock(64, 64, 2, add=True))
        self.stage4 = nn.Sequential(ConvUnit(64, 128, 3, 2), SplitBlock(128, 128, 2, add=True))
        self.stage5 = nn.Sequential(
            ConvUnit(128, 256, 3, 2), SplitBlock(256, 256, 1, add=True), PooledContext(256)
        )
        self.down4 = SplitBlock(256 + 128, 128, 1)
        self.down3 = SplitBlock(128 + 64, 64, 1)
        self.shrink3 = ConvUnit(64, 64, 3, 2)
        self.up4 = SplitBlock(64 + 128, 128, 1)
        self.shrink4 = ConvUnit(128, 128, 3, 2)
        self.up5 = SplitBlock(128 + 256, 256, 1)
        self.heads = nn.ModuleList(Head(channels) for channels in (64, 128, 256))

    def forward(self, x: Tensor) -> Tensor:
        x3 = self.stage3(self.stage2(self.stem(x)))
        x4 = self.stage4(x3)
        x5 = self.stage5(x4)
        down4 = self.down4(torch.cat([_doubled(x5), x4], 1))
        up3 = self.down3(torch.cat([_doubled(down4), x3], 1))
        up4 = self.up4(torch.cat([self.shrink3(up3), down4], 1))
        up5 = self.up5(torch.cat([self.shrink4(up4), x5], 1))
        scales = zip(self.heads, (up3, up4, up5), strict=True)
        return torch.cat([head(x).flatten(2) for head, x in scales], 2)


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0)
