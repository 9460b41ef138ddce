"""How a case of a regime is timed and a whole run of them told, whatever the operation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from bench import isa
from bench.baselines import Unavailable
from bench.case import Prepared
from bench.command import console, positive
from bench.regimes_report import LOSS, Result, Run, save, tables
from bench.timing import HOPELESS, Rivals, contenders, rounds_within, scout, timed_call
from sparsekit import gate
from sparsekit.demo.report import rich_table
from sparsekit.workload import Workload


@dataclass(frozen=True)
class Race:
    """What became of ours and its rivals.

    Attributes:
        seconds: Median of every path; of slow ones from a turn or a few.
        fastest: The dense path that is.
        speedup: Its time over ours, median over the rounds.
        verdict: What `convert`'s gate says, of losses alone.
        rivals: Those that took part in the rounds.
    """

    seconds: dict[str, float]
    fastest: str
    speedup: float
    verdict: gate.Verdict | None
    rivals: Rivals


def race(
    prepared: Prepared,
    workload: Workload,
    seconds: float,
    most_rounds: int,
    beside: Mapping[str, Callable[[], Tensor]] | None = None,
) -> Race:
    """Times a case.

    Args:
        prepared: Its paths.
        workload: The same for the gate.
        seconds: Budget of the timed rounds; at least three rounds are made.
        most_rounds: And at most this many.
        beside: What takes its turns as well but is nobody's rival.
    """
    with torch.inference_mode():
        calls = {"ours": prepared.ours, **prepared.dense, **prepared.sparse}
        # Apart, since all of the dense ones may be far behind the sparse ones.
        once = scout(prepared.dense) | scout({"ours": prepared.ours, **prepared.sparse})
        racing = {name: calls[name] for name in contenders(once, prepared.dense)}
        # A sparse engine that is slower than dense has lost already.
        quickest = min(once[name] for name in racing)
        racing |= {n: c for n, c in prepared.sparse.items() if once[n] <= HOPELESS * quickest}
        racing |= beside or {}
        once |= {name: timed_call(call) for name, call in (beside or {}).items()}
        # A turn is up to five calls.
        round_s = 5 * (once["ours"] + sum(once[name] for name in racing))
        rivals = Rivals({"ours": prepared.ours, **racing})
        rivals.run(rounds_within(seconds, round_s, at_least=3, at_most=most_rounds))
        medians = rivals.medians()
        fastest = min((name for name in racing if name in prepared.dense), key=medians.__getitem__)
        speedup = rivals.speedup("ours", fastest)
        verdict = gate.measure(workload) if speedup < LOSS else None
    return Race({**once, **medians}, fastest, speedup, verdict, rivals)


def result_of(prepared: Prepared, raced: Race, **case: Any) -> Result:
    """The report's row of a case: what is given of it, and the times."""
    ms = {name: seconds * 1e3 for name, seconds in raced.seconds.items()}
    return Result(
        kernel=prepared.kernel,
        ms=ms["ours"],
        speedup=raced.speedup,
        fastest_dense=raced.fastest,
        dense_ms={name: ms[name] for name in prepared.dense},
        peers_ms={name: ms[name] for name in prepared.sparse},
        unavailable=prepared.unavailable,
        gate_speedup=raced.verdict.speedup if raced.verdict else None,
        gate_keeps_dense=not raced.verdict.wins if raced.verdict else None,
        **case,
    )


class Countable(Protocol):
    """A case that can be told how long it will take."""

    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def operations(self) -> int: ...


def estimate(todo: Sequence[Countable], seconds: float) -> list[float]:
    """Seconds that each case will take, roughly, without sparse engines; from one dense call."""
    torch.set_num_threads(1)
    x, weight = torch.randn(64, 1024), torch.randn(1024, 1024)
    rate = 2 * 64 * 1024 * 1024 / timed_call(lambda: torch.nn.functional.linear(x, weight))
    return [
        # Building every path; scouting, three turns of four rivals; then the budget, or three
        # rounds of three rivals. A turn is five calls, of long calls two.
        2e-8 * job.weights + 0.1 + 24 * call + max(seconds, 18 * call)
        for job in todo
        for call in [job.operations / rate / job.threads]
    ]


J = TypeVar("J", bound=Countable)


def measure_all(
    todo: Sequence[J], measured: Callable[[J], Result], run: Run, seconds: float, out: Path
) -> None:
    """Measures every case, shows the tables and writes the files.

    Args:
        todo: The cases.
        measured: Measures one.
        run: Gets the results and the failures.
        seconds: Budget of a case, for the estimate of the whole.
        out: Folder of the result files.

    Raises:
        SystemExit: Cases failed; they are on the screen.
    """
    screen = console()
    expected = estimate(todo, seconds)
    screen.print(f"{len(todo)} cases, about {sum(expected) / 60:.0f} minutes")
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=sum(expected), bar_format=bar_format) as bar:
        try:
            for job, weight in zip(todo, expected, strict=True):
                bar.set_description(job.name)
                try:
                    run.results.append(measured(job))
                except (AssertionError, NotImplementedError, Unavailable) as error:
                    run.failures.append(f"{job.name}: {error}")
                bar.update(weight)
        except KeyboardInterrupt:
            run.failures.append("the run was interrupted: cases are missing")
    for table in tables(run):
        screen.print(rich_table(table))
    for failure in run.failures:
        screen.print(f"[red]{failure}[/]")
    if run.results:
        screen.print(f"wrote {' and '.join(map(str, save(run, out)))}", soft_wrap=True)
    if run.failures:
        sys.exit(1)


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """What every command has that measures regimes."""
    add = parser.add_argument
    add("--threads", nargs="+", type=positive, default=[1, 2], metavar="T")
    add("--rounds", type=positive, default=21, help="most rounds of a case")
    add("--seconds", type=float, default=1.0, help="time budget of a case's rounds")
    add("--isa", choices=sorted(isa.LIMITS), help="limit ours and every rival that can be")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    add("--list", action="store_true", help="print the regimes and stop")
