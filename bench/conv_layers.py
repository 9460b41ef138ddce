"""Single convolutions: what each kind promises, measured against the fastest dense path.

    python -m bench.conv_layers [--regimes 'f32-3x3-*'] [--batches 1] [--threads 1 2] [--isa avx2]
                                [--peers]

A case is a layer with a pattern at a batch size and a number of threads. Its paths take turns. A
loss is judged by `convert`'s gate as well, which keeps such a layer dense. The tables are printed
and written as markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bench import isa, peers
from bench.baselines import Unavailable
from bench.case import machine
from bench.command import add_worker_options, console, positive
from bench.conv_case import ConvCase, ConvLayer, prepare
from bench.peers import Worker
from bench.race import add_case_options, measure_all, race, result_of
from bench.regimes_report import Result, Run
from sparsekit import _native

SPATIAL = (
    ConvLayer("resnet-18", 64, 64, 3, 56),
    ConvLayer("resnet-18", 64, 128, 3, 56, stride=2),
    ConvLayer("resnet-18", 128, 128, 3, 28),
    ConvLayer("resnet-18", 256, 256, 3, 14),
    ConvLayer("resnet-18", 512, 512, 3, 7),
)
POINTWISE = (
    ConvLayer("resnet-50", 64, 256, 1, 56),
    ConvLayer("resnet-50", 512, 128, 1, 28),
    ConvLayer("resnet-50", 256, 1024, 1, 14),
    ConvLayer("mobilenetv2", 160, 960, 1, 7),
)
BATCHES = (1, 8)


@dataclass(frozen=True)
class ConvRegime:
    """Layers that share what limits them, and so a goal.

    Attributes:
        name: For the command line and the tables.
        layers: Each makes a case at each batch size.
        pattern: Of the filters.
        dtype: Of filters and images.
        goal: The geometric mean that is promised, as a ratio to dense; None promises nothing.
        limit: The ratio of operations, which no kernel of this kind can pass.
    """

    name: str
    layers: tuple[ConvLayer, ...]
    pattern: str
    dtype: torch.dtype
    goal: float | None
    limit: float


_F32, _BF16 = torch.float32, torch.bfloat16

REGIMES = (
    ConvRegime("f32-3x3-2:4", SPATIAL, "2:4", _F32, 1.4, 2.0),
    ConvRegime("f32-3x3-2:4v4", SPATIAL, "2:4v4", _F32, 1.6, 2.0),
    ConvRegime("f32-3x3-blocks-75", SPATIAL, "bsr16x16@0.75", _F32, 2.8, 4.0),
    ConvRegime("f32-3x3-blocks-90", SPATIAL, "bsr16x16@0.9", _F32, None, 10.0),
    # Pointwise convolutions are matmuls, with their goals.
    ConvRegime("f32-1x1-2:4", POINTWISE, "2:4", _F32, 1.6, 2.0),
    ConvRegime("f32-1x1-2:4v4", POINTWISE, "2:4v4", _F32, 1.85, 2.0),
    ConvRegime("f32-1x1-blocks-75", POINTWISE, "bsr16x16@0.75", _F32, 3.6, 4.0),
    ConvRegime("f32-1x1-blocks-90", POINTWISE, "bsr16x16@0.9", _F32, 8.5, 10.0),
    ConvRegime("bf16-3x3-2:4", SPATIAL, "2:4", _BF16, None, 2.0),
    ConvRegime("bf16-3x3-2:4v4", SPATIAL, "2:4v4", _BF16, None, 2.0),
    ConvRegime("bf16-3x3-blocks-75", SPATIAL, "bsr16x16@0.75", _BF16, None, 4.0),
    ConvRegime("bf16-1x1-2:4", POINTWISE, "2:4", _BF16, 1.25, 2.0),
    ConvRegime("bf16-1x1-2:4v4", POINTWISE, "2:4v4", _BF16, 1.75, 2.0),
    ConvRegime("bf16-1x1-blocks-75", POINTWISE, "bsr16x16@0.75", _BF16, 3.4, 4.0),
)


@dataclass(frozen=True)
class ConvJob:
    """One case of a regime at a number of threads."""

    regime: ConvRegime
    case: ConvCase
    threads: int

    @property
    def name(self) -> str:
        return f"{self.regime.name} {self.case.name} {self.threads}t"

    @property
    def weights(self) -> int:
        return self.case.layer.outputs * self.case.layer.k

    @property
    def operations(self) -> int:
        return 2 * self.case.m * self.weights


def jobs(
    chosen: Iterable[ConvRegime], batches: Sequence[int], threads: Sequence[int]
) -> list[ConvJob]:
    """Every case, those of one layer in a row, since its filters are made once."""
    return [
        ConvJob(regime, ConvCase(layer, batch, regime.pattern, regime.dtype), count)
        for regime in chosen
        for layer in regime.layers
        for batch in batches
        for count in threads
    ]


def measure(
    job: ConvJob,
    seconds: float,
    most_rounds: int,
    workers: Sequence[Worker] = (),
    every_isa: bool = True,
) -> Result:
    """Measures a case.

    Args:
        job: Which.
        seconds: As in `race`.
        most_rounds: As in `race`.
        workers: As in `prepare`.
        every_isa: As in `prepare`.

    Raises:
        AssertionError: Our result is wrong.
    """
    torch.set_num_threads(job.threads)
    case, layer = job.case, job.case.layer
    prepared, workload = prepare(case, workers, every_isa)
    return result_of(
        prepared,
        race(prepared, workload, seconds, most_rounds),
        regime=job.regime.name,
        pattern=case.pattern,
        dtype=_native.DTYPE_NAMES[case.dtype],
        m=case.m,
        n=layer.outputs,
        k=layer.k,
        threads=job.threads,
        counts=True,
        gbytes_per_s=None,
        bandwidth_share=None,
        layer=f"{layer.name}, batch {case.batch}",
    )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.conv_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [regime.name for regime in REGIMES]
    add = parser.add_argument
    add("--regimes", nargs="+", default=["*"], metavar="GLOB", help="names, or globs over them")
    add("--layers", nargs="+", default=["*"], metavar="GLOB", help="such as '3x3*' or '*-at-56'")
    add("--batches", nargs="+", type=positive, default=list(BATCHES), metavar="B")
    add("--peers", action="store_true", help="DeepSparse too, on the same filters")
    add_case_options(parser)
    add_worker_options(parser, ["deepsparse"])
    options = parser.parse_args(given)
    for glob in options.regimes:
        if not fnmatch.filter(names, glob):
            parser.error(f"--regimes: {glob!r} matches none of {', '.join(names)}")
    layers = [layer.name for layer in SPATIAL + POINTWISE]
    for glob in options.layers:
        if not fnmatch.filter(layers, glob):
            parser.error(f"--layers: {glob!r} matches none of {', '.join(layers)}")
    return options


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if options.isa:
        isa.limit(options.isa, "bench.conv_layers", sys.argv[1:] if given is None else given)
    chosen = [regime for regime in REGIMES if _matches(regime.name, options.regimes)]
    if options.list:
        screen = console()
        for regime in chosen:
            goal = f"goal {regime.goal}x, " if regime.goal else ""
            layers = ", ".join(layer.name for layer in regime.layers)
            screen.print(f"{regime.name}: {goal}limit {regime.limit}x, {layers}", highlight=False)
        return
    todo = [
        job
        for job in jobs(chosen, options.batches, options.threads)
        if _matches(job.case.layer.name, options.layers)
    ]
    if not todo:
        sys.exit("nothing to measure: no regime that was chosen has such a layer")
    where = machine()
    run = Run(
        date=datetime.date.today().isoformat(),
        cpu=where["cpu"],
        isa=where["isa"],
        torch=where["torch"],
        goals={regime.name: (regime.goal, regime.limit) for regime in chosen},
        bandwidth="",
        title="Convolutions",
    )
    with ExitStack() as stack:
        try:
            engines = ["deepsparse"] if options.peers else []
            workers = peers.start_workers(engines, vars(options))
        except Unavailable as missing:
            sys.exit(str(missing))
        for worker in workers:
            stack.enter_context(worker)
        measure_all(
            todo,
            lambda job: measure(job, options.seconds, options.rounds, workers, not options.isa),
            run,
            options.seconds,
            options.out,
        )


if __name__ == "__main__":
    main()
