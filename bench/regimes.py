"""The regimes of the CPU kernels: what each promises, measured against the fastest dense path.

    python -m bench.regimes [--regimes 'f32-*'] [--shapes 4096x1024] [--threads 1 2] [--isa avx2]
                            [--peers deepsparse scipy-csr]

A case is a layer of a regime at a batch size and a number of threads. Its paths take turns. A loss
is judged by `convert`'s gate as well, which keeps such a layer dense. The tables are printed and
written as markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from bench import isa, peers
from bench.baselines import BASELINES, Baseline, Unavailable
from bench.case import Case, machine, prepare, streamed_bytes
from bench.command import add_worker_options, console, positive, size
from bench.race import add_case_options, measure_all, race, result_of
from bench.regimes_report import Result, Run
from bench.shapes import Shape
from bench.timing import timed_call
from sparsekit import _native
from sparsekit.workload import LinearWorkload

SIZES = (
    (384, 384),
    (1536, 384),
    (384, 1536),
    (768, 3072),
    (4096, 1024),
    (4096, 4096),
    (11008, 4096),
    (1000, 2048),
    (77, 130),
)
"""(n, k) of the regimes: layers from small encoders to large decoders, and odd ones."""

_MANY = (64, 256, 1024)
_SOME = (16,)
_FEW = (1, 4, 8)


@dataclass(frozen=True)
class Regime:
    """Cases that share what limits them, and so a goal.

    Attributes:
        name: For the command line and the tables.
        patterns: Each makes cases of its own.
        dtype: Of weight and activations.
        goal: The geometric mean over the cases that is promised, as a ratio to dense.
        limit: The ratio that no kernel can pass: of operations, or, streaming, of bytes.
        rows: Values of m that count.
        also: Values of m that are measured and reported without counting.
        streaming: The weights come from memory: layers too small for that are made longer.
    """

    name: str
    patterns: tuple[str, ...]
    dtype: torch.dtype
    goal: float
    limit: float
    rows: tuple[int, ...] = _MANY
    also: tuple[int, ...] = _SOME
    streaming: bool = field(default=False, kw_only=True)


_F32, _BF16 = torch.float32, torch.bfloat16

AVX512 = (
    Regime("f32-2:4", ("2:4",), _F32, 1.6, 2.0),
    Regime("f32-2:4-vectors", ("2:4v4", "2:4v16"), _F32, 1.85, 2.0),
    Regime("f32-blocks-75", ("bsr16x16@0.75",), _F32, 3.6, 4.0),
    Regime("f32-blocks-90", ("bsr16x16@0.9",), _F32, 8.5, 10.0),
    Regime("f32-columns-75", ("bsr4x1@0.75", "bsr16x1@0.75"), _F32, 3.2, 4.0),
    Regime("f32-unstructured-75", ("bsr1x1@0.75",), _F32, 2.2, 4.0),
    Regime("f32-unstructured-90", ("bsr1x1@0.9",), _F32, 4.3, 10.0),
    Regime("f32-4:16", ("4:16",), _F32, 2.2, 4.0),
    Regime("bf16-2:4", ("2:4",), _BF16, 1.25, 2.0),
    Regime("bf16-2:4-vectors", ("2:4v4",), _BF16, 1.75, 2.0),
    Regime("bf16-blocks-75", ("bsr16x16@0.75",), _BF16, 3.4, 4.0),
    Regime("f32-2:4-streaming", ("2:4",), _F32, 1.7, 1.88, _FEW, (), streaming=True),
    Regime("bf16-2:4-streaming", ("2:4",), _BF16, 1.65, 1.78, _FEW, (), streaming=True),
)
AVX2 = (
    Regime("f32-2:4", ("2:4",), _F32, 1.4, 2.0),
    Regime("f32-blocks-75", ("bsr16x16@0.75",), _F32, 3.2, 4.0),
)


def regimes(isa_in_use: str) -> tuple[Regime, ...]:
    """The regimes of an instruction set; of one without goals of its own, those of AVX-512."""
    return AVX2 if isa_in_use == "avx2" else AVX512


# A layer streams when its compressed weight is this many times the last-level cache: caches that
# do not replace the oldest line keep part of a weight that is only a little too large.
_OVERFLOW = 2


def sizes_of(
    regime: Regime, sizes: Sequence[tuple[int, int]], cache_bytes: int
) -> Iterator[tuple[int, int]]:
    """The layers of a regime.

    Args:
        regime: A streaming one takes the large layers alone, as many side by side as overflow the
            cache.
        sizes: (n, k) to choose from.
        cache_bytes: Of the last-level cache.
    """
    for n, k in sizes:
        if not regime.streaming:
            yield n, k
        elif n * k >= 1 << 22:
            compressed = n * k * regime.dtype.itemsize / regime.limit
            yield n * max(1, -int(-_OVERFLOW * cache_bytes // compressed)), k


@dataclass(frozen=True)
class Job:
    """One case of a regime at a number of threads."""

    regime: Regime
    case: Case
    threads: int

    @property
    def name(self) -> str:
        return f"{self.regime.name} {self.case.name} {self.threads}t"

    @property
    def weights(self) -> int:
        return self.case.shape.n * self.case.shape.k

    @property
    def operations(self) -> int:
        return 2 * self.case.m * self.weights


def jobs(
    chosen: Iterable[Regime],
    sizes: Sequence[tuple[int, int]],
    rows: Sequence[int] | None,
    threads: Sequence[int],
) -> list[Job]:
    """Every case, those of one layer in a row, since it is made once.

    Args:
        chosen: Regimes.
        sizes: (n, k).
        rows: Values of m to keep; None keeps all.
        threads: Numbers of threads.
    """
    cache = int(_native.cpu_info()["l3_bytes"]) or 1 << 25
    return [
        Job(regime, Case(Shape("regimes", f"{n}x{k}", n, k, ms), m, pattern, regime.dtype), count)
        for regime in chosen
        for pattern in regime.patterns
        for n, k in sizes_of(regime, sizes, cache)
        for ms in [tuple(m for m in regime.also + regime.rows if rows is None or m in rows)]
        for m in ms
        for count in threads
    ]


BANDWIDTH = (
    "read bandwidth is that of a torch reduction (the fastest of sum over float32, sum over int64 "
    "and dot) over at least 256 MiB and four times the last-level cache, on the same number of "
    "threads, in the same rounds"
)


@lru_cache(maxsize=1)
def _buffer() -> Tensor:
    return torch.ones(max(1 << 28, 4 * int(_native.cpu_info()["l3_bytes"])) // 4)


@lru_cache
def reader(threads: int) -> Callable[[], Tensor]:
    """The reduction over `_buffer` that is the fastest on this many threads; see `BANDWIDTH`."""
    buffer = _buffer()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    candidates: list[Callable[[], Tensor]] = [
        buffer.sum,
        buffer.view(torch.int64).sum,
        lambda: torch.dot(buffer, buffer),
    ]
    quickest = min(candidates, key=lambda call: min(timed_call(call) for _ in range(3)))
    torch.set_num_threads(before)
    return quickest


# Not a rival of ours, but the memory's own speed.
_READ = "read"


def measure(job: Job, baselines: Sequence[Baseline], seconds: float, most_rounds: int) -> Result:
    """Measures a case.

    Args:
        job: Which.
        baselines: What runs beside ours.
        seconds: As in `race`.
        most_rounds: As in `race`.

    Raises:
        AssertionError: Our result is wrong.
    """
    torch.set_num_threads(job.threads)
    case, shape = job.case, job.case.shape
    prepared = prepare(case, baselines)
    packed = prepared.layer.packed
    workload = LinearWorkload(packed, case.m, prepared.layer.bias)
    beside = {_READ: reader(job.threads)} if job.regime.streaming else {}
    raced = race(prepared, workload, seconds, most_rounds, beside)
    rate = share = None
    if job.regime.streaming:
        streamed = streamed_bytes(packed.pattern, *packed.matrix_shape, packed.dtype)
        rate = streamed / raced.seconds["ours"] / 1e9
        share = raced.rivals.speedup("ours", _READ) * streamed / _buffer().nbytes
    return result_of(
        prepared,
        raced,
        regime=job.regime.name,
        pattern=case.pattern,
        dtype=_native.DTYPE_NAMES[case.dtype],
        m=case.m,
        n=shape.n,
        k=shape.k,
        threads=job.threads,
        counts=case.m in job.regime.rows,
        gbytes_per_s=rate,
        bandwidth_share=share,
    )


SPARSE_PEERS = tuple(b.name for b in (*BASELINES, *peers.SCIPY) if not b.dense)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.regimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = (*SPARSE_PEERS, *peers.WORKERS)
    add = parser.add_argument
    add("--regimes", nargs="+", default=["*"], metavar="GLOB", help="names, or globs over them")
    add("--shapes", nargs="+", type=size, default=list(SIZES), metavar="NxK")
    add("--rows", nargs="+", type=positive, metavar="M", help="only these values of m")
    add_case_options(parser)
    add(
        "--peers",
        nargs="*",
        choices=known,
        help="sparse and foreign engines beside the dense ones; without names all of them",
    )
    add_worker_options(parser, peers.WORKERS)
    options = parser.parse_args(given)
    options.peers = list(known) if options.peers == [] else options.peers or []
    names = {regime.name for regime in AVX512 + AVX2}
    for glob in options.regimes:
        if not fnmatch.filter(names, glob):
            parser.error(f"--regimes: {glob!r} matches none of {', '.join(sorted(names))}")
    return options


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if options.isa:
        isa.limit(options.isa, "bench.regimes", sys.argv[1:] if given is None else given)
    where = machine()
    chosen = [
        regime
        for regime in regimes(where["isa"])
        if any(fnmatch.fnmatchcase(regime.name, glob) for glob in options.regimes)
    ]
    screen = console()
    if options.list:
        for regime in chosen:
            screen.print(
                f"{regime.name}: {', '.join(regime.patterns)}, goal {regime.goal}x, "
                f"limit {regime.limit}x, m in {regime.also + regime.rows}",
                highlight=False,
            )
        return
    todo = jobs(chosen, options.shapes, options.rows, options.threads)
    if not todo:
        sys.exit("nothing to measure: no case has these regimes, shapes and rows together")
    run = Run(
        date=datetime.date.today().isoformat(),
        cpu=where["cpu"],
        isa=where["isa"],
        torch=where["torch"],
        goals={regime.name: (regime.goal, regime.limit) for regime in chosen},
        bandwidth=BANDWIDTH,
    )
    with ExitStack() as stack:
        baselines = [b for b in BASELINES + peers.SCIPY if b.dense or b.name in options.peers]
        try:
            engines = [name for name in peers.WORKERS if name in options.peers]
            for worker in peers.start_workers(engines, vars(options)):
                stack.enter_context(worker)
                baselines.append(peers.worker_baseline(worker))
        except Unavailable as missing:
            sys.exit(str(missing))
        if options.isa:
            baselines = [baseline for baseline in baselines if baseline.every_isa]
        measure_all(
            todo,
            lambda job: measure(job, baselines, options.seconds, options.rounds),
            run,
            options.seconds,
            options.out,
        )


if __name__ == "__main__":
    main()
