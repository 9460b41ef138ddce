"""The digits study: before, during and after training, on every pattern, with several seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench import digits as task
from bench.pruning.journal import Journal
from sparsekit.convert import convert
from sparsekit.prune import (
    METHODS,
    TRAINING_METHODS,
    SparseTraining,
    find_lottery_ticket,
    prune,
    train_sparse,
    update_batchnorm,
)

PATTERNS = (
    "2:4",
    "2:4v4",
    "bsr16x16@0.5",
    "bsr16x16@0.75",
    "bsr1x1@0.5",
    "bsr1x1@0.75",
    "bsr1x1@0.9",
    "bsr1x1@0.95",
)
BEFORE = ("random", "magnitude", "snip", "synflow")
"""Methods of `METHODS` that are meant for a network that has not been trained."""
TARGETS = "blocks.*"
EPOCHS = 12
TUNING_EPOCHS = 4
# Fine-tuning begins where training has ended.
_TUNING_RATE = 1e-3
_CALIBRATION = 512
# Of the largest score: two orders of summation.
_SAME = 1e-4
_LOTTERY_ROUNDS = 3
_LOTTERY_REWIND = 2
"""Epochs of the first training that a ticket is rewound to."""


@dataclass(frozen=True)
class Trial:
    """One way to a sparse network.

    Attributes:
        when: "before", "during" or "after" training.
        method: A name in `METHODS` or `TRAINING_METHODS`, or "lottery".
        pattern: Its spelling.
        seed: Of the network, its training and its pruning.
        reconstruction: A name in `RECONSTRUCTIONS`; "" takes the method's own.
        allocation: A name in `ALLOCATIONS`.
    """

    when: str
    method: str
    pattern: str
    seed: int
    reconstruction: str = ""
    allocation: str = "uniform"

    @property
    def asked(self) -> dict[str, Any]:
        """The key in the journal."""
        return {"study": "digits", **asdict(self)}


def trials(patterns: Sequence[str], seeds: int) -> Iterator[Trial]:
    """All of them, the first seed of everything first."""
    for seed in range(seeds):
        for pattern in patterns:
            for method in METHODS:
                yield Trial("after", method, pattern, seed)
            yield Trial("after", "sparsegpt", pattern, seed, "least_squares")
            for method in BEFORE:
                yield Trial("before", method, pattern, seed)
            for method in TRAINING_METHODS:
                yield Trial("during", method, pattern, seed)
            yield Trial("during", "lottery", pattern, seed)
        for pattern in ("bsr1x1@0.9", "bsr16x16@0.75"):
            for method in ("random", "magnitude", "sparsegpt"):
                for allocation in ("erk", "global", "owl"):
                    yield Trial("after", method, pattern, seed, allocation=allocation)
            yield Trial("before", "random", pattern, seed, allocation="erk")
            yield Trial("before", "snip", pattern, seed, allocation="global")
            yield Trial("before", "synflow", pattern, seed, allocation="global")


def run(
    journal: Journal, patterns: Sequence[str], seeds: int, models: Path, share: tuple[int, int]
) -> None:
    """Fills the journal with what it lacks.

    Args:
        journal: Where results go.
        patterns: Their spellings.
        seeds: How many networks.
        models: Folder of the trained dense networks.
        share: (i, of) makes this process do every `of`-th trial from the i-th on, from 0.
    """
    digits = task.load()
    todo = list(trials(patterns, seeds))[share[0] :: share[1]]
    todo = [trial for trial in todo if trial.asked not in journal]
    with tqdm(todo, unit="network") as bar:
        for trial in bar:
            bar.set_description(f"{trial.when} {trial.method} {trial.pattern} seed {trial.seed}")
            started = time.perf_counter()
            found = _run(trial, digits, models)
            journal.add(trial.asked, {**found, "seconds": time.perf_counter() - started})


def _run(trial: Trial, digits: task.Digits, models: Path) -> dict[str, float]:
    """Accuracies by stage."""
    torch.manual_seed(trial.seed)
    model: nn.Module = task.DigitsResNet()
    score = partial(task.accuracy, digits=digits)
    if trial.when == "during":
        _DURING.get(trial.method, _train_sparse)(trial, model, digits)
        return {"recovered": score(model)}
    if trial.when == "before":
        masks = _prune(trial, model, digits).masks
        task.train(model, digits, EPOCHS, masks=masks, seed=trial.seed)
        return {"recovered": score(model)}
    model = deepcopy(dense(trial.seed, digits, models))
    found = {"dense": score(model)}
    masks = _prune(trial, model, digits).masks
    found["pruned"] = score(model)
    update_batchnorm(model, task.batches(digits, 256), loss=task.loss)
    found["statistics"] = score(model)
    task.train(model, digits, TUNING_EPOCHS, _TUNING_RATE, masks, seed=trial.seed)
    found["recovered"] = score(model)
    check_converted(model, digits)
    return found


def check_converted(model: nn.Module, digits: task.Digits) -> None:
    """The kernels give the scores of the pruned network.

    Raises:
        AssertionError: They do not.
    """
    sparse = deepcopy(model)
    convert(
        sparse,
        example_inputs=digits.test_images,
        gate="always",
        targets=TARGETS,
        fuse="all",
        fold_batchnorm=True,
        progress=False,
    )
    with torch.no_grad():
        ours, expected = sparse(digits.test_images), model(digits.test_images)
    error, scale = float((ours - expected).abs().max()), float(expected.abs().max())
    assert error <= _SAME * scale, f"converted scores are off by {error} of {scale}"


def dense(seed: int, digits: task.Digits, models: Path) -> nn.Module:
    """The trained network of a seed, from the folder if it is there."""
    torch.manual_seed(seed)
    model = task.DigitsResNet()
    path = models / f"digits-{EPOCHS}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    task.train(model, digits, EPOCHS, seed=seed)
    models.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def _prune(trial: Trial, model: nn.Module, digits: task.Digits) -> Any:
    return prune(
        model,
        trial.pattern,
        trial.method,
        task.batches(digits, most=_CALIBRATION),
        TARGETS,
        reconstruction=trial.reconstruction or None,
        allocation=trial.allocation,
        loss=task.loss,
        seed=trial.seed,
        progress=False,
    )


def _train_sparse(trial: Trial, model: nn.Module, digits: task.Digits) -> None:
    def watch(optimizer: torch.optim.Optimizer, steps: int) -> SparseTraining:
        return train_sparse(
            model, trial.pattern, trial.method, optimizer, steps=steps, targets=TARGETS
        )

    task.train(model, digits, EPOCHS, seed=trial.seed, watch=watch)


def _lottery(trial: Trial, model: nn.Module, digits: task.Digits) -> None:
    def train(net: nn.Module, masks: Any) -> None:
        task.train(net, digits, EPOCHS, masks=masks, seed=trial.seed)

    ticket = find_lottery_ticket(
        model,
        trial.pattern,
        train,
        rounds=_LOTTERY_ROUNDS,
        rewind=_LOTTERY_REWIND * len(task.batches(digits)),
        targets=TARGETS,
    )
    train(model, ticket.masks)


_DURING: dict[str, Callable[[Trial, nn.Module, task.Digits], None]] = {"lottery": _lottery}
