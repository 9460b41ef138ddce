"""Accuracy of pruned convolutions, on real images: a small ResNet reads handwritten digits.

    python -m bench.digits [--patterns 2:4 2:4v4] [--methods magnitude sparsegpt]

scikit-learn's 1797 images of 8x8 pixels; two thirds train the network from a fixed seed, the rest
tell how often it is right. It is pruned at once by each method, trained on for a few epochs with
its zeros held, and converted; the sparse network must be right as often as the pruned dense one.
The table is printed and written as markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import sparsekit as sk
from bench.case import machine
from bench.command import console, positive
from bench.report import markdown_table, save_run, stem
from sparsekit.demo import encoder
from sparsekit.demo.report import Table, rich_table
from sparsekit.prune import METHODS, hold_masks

PATTERNS = ("2:4", "2:4v4", "bsr16x16@0.5")
_BATCH = 64
_RATE = 3e-3
# Fine-tuning begins where training has ended.
_TUNING_RATE = 1e-3
_CALIBRATION = 512
# Of the largest score: two orders of summation.
_SAME = 1e-4


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


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    rate: float = _RATE,
    masks: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Trains a model in place, by images that are moved by up to a pixel.

    Args:
        model: Any.
        digits: What to learn.
        epochs: Times that every image is seen.
        rate: The largest; it falls to nothing.
        masks: Weights that stay zero.

    Returns:
        The model, in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    count = len(digits.train_labels)
    steps = epochs * -(-count // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with hold_masks(model, masks or {}, optimizer):
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator).split(_BATCH):
                down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
                images = digits.train_images[rows].roll((down, right), (2, 3))
                loss = functional.cross_entropy(
                    model(images), digits.train_labels[rows], label_smoothing=0.1
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of the test images that a model reads right."""
    right = model(digits.test_images).argmax(1) == digits.test_labels
    return float(right.double().mean())


@dataclass(frozen=True)
class Result:
    """A pattern and a method.

    Attributes:
        pruned: Accuracy right after pruning.
        tuned: After training on with the zeros held.
        converted: Of the sparse network that was made of that one.
        sparse_layers: Layers that are sparse in it.
    """

    pattern: str
    method: str
    pruned: float
    tuned: float
    converted: float
    sparse_layers: int


def measure(
    dense: nn.Module, digits: Digits, pattern: str, method: str, tuning_epochs: int
) -> Result:
    """Prunes a copy of the dense network, trains it on and converts it.

    Raises:
        AssertionError: The sparse network gives other scores than the pruned one.
    """
    model = deepcopy(dense)
    report = sk.prune(
        model, pattern, method, [digits.train_images[:_CALIBRATION]], "blocks.*", progress=False
    )
    pruned = accuracy(model, digits)
    train(model, digits, tuning_epochs, _TUNING_RATE, report.masks)
    tuned = accuracy(model, digits)
    sparse = deepcopy(model)
    rows = sk.convert(
        sparse,
        pattern,
        digits.test_images,
        gate="always",
        targets="blocks.*",
        fuse="all",
        fold_batchnorm=True,
        progress=False,
    ).rows
    with torch.no_grad():
        scores, expected = sparse(digits.test_images), model(digits.test_images)
    error, scale = float((scores - expected).abs().max()), float(expected.abs().max())
    assert error <= _SAME * scale, f"{pattern}, {method}: scores are off by {error} of {scale}"
    converted = accuracy(sparse, digits)
    assert converted == tuned, f"{pattern}, {method}: {converted} converted, {tuned} before"
    count = sum(row.verdict == "sparse" for row in rows)
    return Result(pattern, method, pruned, tuned, converted, count)


def table(dense: float, results: Sequence[Result]) -> Table:
    """One row per pattern and method."""
    rows = [
        (
            result.pattern,
            result.method,
            f"{dense:.1%}",
            f"{result.pruned:.1%}",
            f"{result.tuned:.1%}",
            f"{result.converted:.1%}",
            str(result.sparse_layers),
        )
        for result in results
    ]
    head = ("pattern", "method", ">dense", ">pruned", ">trained on", ">converted", ">sparse layers")
    return Table("Handwritten digits", head, rows)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--patterns", nargs="+", default=list(PATTERNS), metavar="PATTERN")
    add("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    add("--epochs", type=positive, default=30, help="of training the dense network")
    add("--tuning-epochs", type=positive, default=5, help="of training a pruned one on")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    try:
        digits = load()
    except ImportError as missing:
        sys.exit(str(missing))
    torch.manual_seed(0)
    dense = train(DigitsResNet(), digits, options.epochs)
    right = accuracy(dense, digits)
    todo = [(pattern, method) for pattern in options.patterns for method in options.methods]
    results = []
    with tqdm(todo, unit="network") as bar:
        for pattern, method in bar:
            bar.set_description(f"{pattern} {method}")
            results.append(measure(dense, digits, pattern, method, options.tuning_epochs))
    screen = console()
    found = table(right, results)
    screen.print(rich_table(found))
    where = machine()
    date = datetime.date.today().isoformat()
    text = "\n".join(
        [
            f"# Accuracy of pruned convolutions: {date}",
            "",
            f"torch {where['torch']}, {where['cpu']}. A ResNet of seven convolutions in its "
            f"blocks, trained for {options.epochs} epochs, pruned at once and trained on for "
            f"{options.tuning_epochs} with its zeros held; accuracy on "
            f"{len(digits.test_labels)} images that it never saw.",
            "",
            *markdown_table(found),
        ]
    )
    figures = {"date": date, **where, "dense": right, "results": [asdict(r) for r in results]}
    name = f"{stem(date, where['cpu'], where['isa'])}-digits"
    paths = save_run(options.out, name, text, figures)
    screen.print(f"wrote {' and '.join(map(str, paths))}", soft_wrap=True)


if __name__ == "__main__":
    main()
