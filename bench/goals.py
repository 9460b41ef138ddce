"""The speed goals of the CPU kernels: each against the fastest dense path of the same run.

python -m bench.goals [--threads 2] [--rounds 21]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.case import KERNEL_SHAPE, Case, machine, prepare
from bench.shapes import Shape
from bench.timing import Rivals
from sparsekit import _native


@dataclass(frozen=True)
class Goal:
    """A case, and how many times faster than the fastest dense path it is meant to be."""

    case: Case
    factor: float


def _larger_than_cache() -> Shape:
    """A layer whose compressed float32 2:4 weight does not fit into the last-level cache."""
    k = 4096
    bytes_per_row = k * 4 * 0.53125  # half the values, and two bits for each
    rows = int(1.25 * _native.cpu_info()["l3_bytes"] / bytes_per_row)
    n = max(14336, -(-rows // 1024) * 1024)
    return Shape("reference", "larger-than-cache", n, k, (1,))


def goals() -> tuple[Goal, ...]:
    """The goals, for AVX-512 and two threads."""
    wide, f32 = KERNEL_SHAPE, torch.float32
    return (
        Goal(Case(wide, 256, "2:4", f32), 1.35),
        Goal(Case(wide, 256, "bsr16x16@0.75", f32), 3.0),
        Goal(Case(wide, 256, "bsr16x16@0.9", f32), 7.0),
        Goal(Case(wide, 256, "2:4v4", torch.bfloat16), 1.5),
        Goal(Case(_larger_than_cache(), 1, "2:4", f32), 1.5),
    )


def measure(goal: Goal, rounds: int) -> list[str]:
    """One row of the table: interleaved medians of our kernel and every dense path."""
    case = goal.case
    prepared = prepare(case, sparse_baselines=False)
    with torch.inference_mode():
        rivals = Rivals({"ours": prepared.ours, **prepared.dense}).run(rounds)
    medians = rivals.medians()
    fastest = min(prepared.dense, key=lambda name: medians[name])
    factor = rivals.speedup("ours", fastest)
    others = ", ".join(f"{name} {medians[name] * 1e3:.3f}" for name in prepared.dense)
    return [
        f"m={case.m} n={case.shape.n} k={case.shape.k}",
        case.pattern,
        _native.DTYPE_NAMES[case.dtype],
        prepared.kernel,
        f"{medians['ours'] * 1e3:.3f}",
        others,
        fastest,
        f"{goal.factor:.2f}x",
        f"[green]{factor:.2f}x[/]" if factor >= goal.factor else f"[red]{factor:.2f}x[/]",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where = machine()
    table = Table(title=f"{where['cpu']}, {where['isa']}, {options.threads} threads")
    for column in ("problem", "pattern", "dtype", "kernel", "ms", "dense ms", "fastest dense"):
        table.add_column(column)
    table.add_column("goal", justify="right")
    table.add_column("measured", justify="right")
    for goal in tqdm(goals(), desc="measuring"):
        table.add_row(*measure(goal, options.rounds))
    # Whole words in a log file too.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
