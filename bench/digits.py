"""A small ResNet that reads handwritten digits, trained in a minute.

scikit-learn's 1797 images of 8x8 pixels: two thirds train the network, the rest tell how often it
is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from sparsekit.demo import encoder
from sparsekit.prune import SparseTraining, hold_masks

_BATCH = 64
_RATE = 3e-3

Watch: TypeAlias = Callable[[Optimizer, int], SparseTraining]
"""`(optimizer, steps)` -> what makes the training a sparse one."""


class ResidualBlock(nn.Module):
    """`relu(x + conv(relu(conv(x))))`, each convolution normalised; the first may halve images."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.act2(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Images `[N, 1, 8, 8]` to scores of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(32, 32, 1), ResidualBlock(32, 64, 2), ResidualBlock(64, 64, 1)
        )
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` between 0 and 1 and what they show, in two parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """The same split every time.

    Raises:
        ImportError: scikit-learn is missing; the message says how to get it.
    """
    encoder.require("sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    return Digits(images[train], labels[train], images[test], labels[test])


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Of `(images, labels)`."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels, label_smoothing=0.1)


def batches(digits: Digits, size: int = _BATCH, most: int | None = None) -> list[Any]:
    """`(images, labels)` of the training part, in its order."""
    images, labels = digits.train_images[:most], digits.train_labels[:most]
    return list(zip(images.split(size), labels.split(size), strict=True))


def _epoch(digits: Digits, generator: torch.Generator) -> Iterator[Any]:
    """Every image once, moved by up to a pixel."""
    for rows in torch.randperm(len(digits.train_labels), generator=generator).split(_BATCH):
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        yield digits.train_images[rows].roll((down, right), (2, 3)), digits.train_labels[rows]


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    rate: float = _RATE,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> nn.Module:
    """Trains a model in place.

    Args:
        model: Any.
        digits: What to learn.
        epochs: Times that every image is seen.
        rate: The largest; it falls to nothing.
        masks: Weights that stay zero.
        seed: Of the order of the images.
        watch: Makes the training a sparse one; it has finished when this returns.

    Returns:
        The model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = epochs * -(-len(digits.train_labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = None if watch is None else watch(optimizer, steps)
    model.train()
    with hold_masks(model, masks or {}, optimizer):
        for _ in range(epochs):
            for batch in _epoch(digits, generator):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
                schedule.step()
    if run is not None:
        run.finish()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of the test images that a model reads right."""
    right = model(digits.test_images).argmax(1) == digits.test_labels
    return float(right.double().mean())
