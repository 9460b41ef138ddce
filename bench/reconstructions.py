"""What each reconstruction loses of a layer's outputs, and how long it takes, on trained layers.

    python -m bench.reconstructions [--networks minilm digits] [--patterns 2:4 2:4v4]

Layers of all-MiniLM-L6-v2, with the inputs that docstrings of Python's standard library give them,
and of the small ResNet of bench/digits.py, with handwritten digits. Every layer is pruned alone,
from the dense weight and the dense inputs. The tables are printed and written as markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import digits
from bench.case import machine
from bench.command import console, positive
from bench.report import markdown_table, save_run, stem
from sparsekit.demo import corpus, encoder
from sparsekit.demo.report import Table, rich_table
from sparsekit.patterns import parse_pattern
from sparsekit.prune import METHODS, RECONSTRUCTIONS
from sparsekit.prune.calibration import Calibration, read_batches
from sparsekit.prune.layers import Layer
from sparsekit.prune.reconstruct import ReconstructionOptions, reconstruct, relative_error
from sparsekit.prune.targets import choose_layers

PATTERNS = ("2:4", "2:4v4", "bsr16x16@0.5", "bsr1x1@0.75")
CHOICES = {
    "wanda": ("wanda", "none"),
    "sparsegpt": ("sparsegpt", "sweep"),
    "least squares": ("sparsegpt", "least_squares"),
    "admm": ("wanda", "admm"),
}
"""Name in the tables -> method and reconstruction, with the score that serves it best."""

_MINILM_LAYERS = tuple(
    f"bert.encoder.layer.{block}.{part}"
    for block in (0, 3, 5)
    for part in (
        "attention.self.query",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
)
_DIGITS_LAYERS = ("blocks.0.conv1", "blocks.1.conv2", "blocks.2.conv1", "blocks.2.conv2")
_IMAGES = 512


@dataclass(frozen=True)
class Problem:
    """A layer with the second moments of its inputs."""

    network: str
    layer: Layer
    moments: Tensor


@dataclass(frozen=True)
class Result:
    """A layer pruned one way.

    Attributes:
        choice: Key of `CHOICES`.
        error: Change of its outputs, relative to them.
        seconds: Of the processor, on all threads, to choose mask and values.
    """

    network: str
    layer: str
    shape: tuple[int, ...]
    pattern: str
    choice: str
    error: float
    seconds: float


def minilm(texts: int, epochs: int) -> Iterator[Problem]:
    """Layers of the demo's trained encoder.

    Raises:
        ImportError: An optional package is missing.
    """
    model, tokenizer = encoder.load_dense(), encoder.load_tokenizer()
    found = corpus.split(corpus.collect(progress=False)).training_texts()
    chosen = found[:: max(1, len(found) // texts)][:texts]
    return problems("minilm", model, encoder.batches(tokenizer, chosen), _MINILM_LAYERS)


def small_resnet(texts: int, epochs: int) -> Iterator[Problem]:
    """Layers of a ResNet that is trained here.

    Raises:
        ImportError: scikit-learn is missing.
    """
    images = digits.load()
    torch.manual_seed(0)
    model = digits.train(digits.DigitsResNet(), images, epochs)
    return problems("digits", model, [images.train_images[:_IMAGES]], _DIGITS_LAYERS)


NETWORKS: dict[str, Callable[[int, int], Iterator[Problem]]] = {
    "minilm": minilm,
    "digits": small_resnet,
}


def problems(
    network: str, model: nn.Module, batches: Iterable[Any], names: Sequence[str]
) -> Iterator[Problem]:
    """Layers of a model, with what its batches put into them."""
    chosen, _ = choose_layers(model, "2:4", names, None)
    layers = [layer for layer, _ in chosen.values()]
    with Calibration(model, read_batches(batches), layers) as calibration:
        for group in calibration.groups:
            moments = calibration.moments(group)
            for layer in group.layers:
                yield Problem(network, layer, moments)
            calibration.done(group)


@torch.no_grad()
def measure(problem: Problem, pattern: str, choice: str) -> Result:
    """Prunes a copy of the layer's weight."""
    method, reconstruction = CHOICES[choice]
    wanted, layer = parse_pattern(pattern), problem.layer
    weights = layer.matrices(layer.weight, wanted)
    moments = layer.pad_moments(problem.moments, wanted)
    began = time.process_time()
    pruned, _ = reconstruct(
        RECONSTRUCTIONS[reconstruction],
        weights,
        wanted,
        METHODS[method].score,
        moments,
        ReconstructionOptions(),
    )
    seconds = time.process_time() - began
    error = relative_error(weights, pruned, moments)
    shape = tuple(layer.weight.shape)
    return Result(problem.network, layer.name, shape, pattern, choice, error, seconds)


def tables(results: Sequence[Result]) -> list[Table]:
    """One for each pattern: a row for each layer, error and seconds of each choice."""
    head = (
        "layer",
        "shape",
        *(f">{name}" for name in CHOICES),
        *(f">{name}, s" for name in CHOICES),
    )
    out = []
    for pattern in dict.fromkeys(result.pattern for result in results):
        rows: dict[tuple[str, str], dict[str, Result]] = {}
        for result in results:
            if result.pattern == pattern:
                rows.setdefault((result.network, result.layer), {})[result.choice] = result
        out.append(Table(pattern, head, [_row(name, row) for name, row in rows.items()]))
    return out


def _row(name: tuple[str, str], results: dict[str, Result]) -> tuple[str, ...]:
    found = [results[choice] for choice in CHOICES]
    best = min(result.error for result in found)
    errors = [f"{r.error:.4f}" if r.error > best else f"**{r.error:.4f}**" for r in found]
    shape = "x".join(map(str, found[0].shape))
    layer = name[1].removeprefix("bert.encoder.")
    return (f"{name[0]} {layer}", shape, *errors, *(f"{r.seconds:.2f}" for r in found))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.reconstructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    add("--patterns", nargs="+", default=list(PATTERNS), metavar="PATTERN")
    add("--texts", type=positive, default=300, help="that calibrate the encoder")
    add("--epochs", type=positive, default=30, help="of training the ResNet")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    results: list[Result] = []
    with tqdm(unit="layer") as bar:
        for network in options.networks:
            bar.set_description(network)
            try:
                found = NETWORKS[network](options.texts, options.epochs)
            except ImportError as missing:
                sys.exit(str(missing))
            for problem in found:
                results += [
                    measure(problem, pattern, choice)
                    for pattern in options.patterns
                    for choice in CHOICES
                ]
                bar.update()
    found_tables = tables(results)
    screen = console()
    for table in found_tables:
        screen.print(rich_table(table))
    where = machine()
    date = datetime.date.today().isoformat()
    lines = [
        f"# Reconstructions: {date}",
        "",
        f"torch {where['torch']}, {where['cpu']}, {torch.get_num_threads()} threads. Change of a "
        "layer's outputs relative to them, ‖(W - W')X‖ / ‖WX‖, and the processor's seconds, on all "
        "threads, to choose its mask and values once its inputs are known. Every layer is pruned "
        "alone, from dense inputs.",
        "",
    ]
    for table in found_tables:
        lines += markdown_table(table)
    figures = {"date": date, **where, "results": [asdict(result) for result in results]}
    name = f"{stem(date, where['cpu'], where['isa'])}-reconstructions"
    paths = save_run(options.out, name, "\n".join(lines), figures)
    screen.print(f"wrote {' and '.join(map(str, paths))}", soft_wrap=True)


if __name__ == "__main__":
    main()
