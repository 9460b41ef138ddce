"""The GPU kernels against what torch offers there, in interleaved rounds of one run.

    python -m bench.gpu --out build/gpu [--quick] [--regimes 'decode-*'] [--rows 1 16]

A case is a layer of a regime at a number of tokens: ours with the kernel the package chooses, the
kernels it could have chosen, forced one by one, cuBLAS and cuBLASLt, torch.compile for some, and
the sparse paths of torch: cuSPARSELt, CUTLASS, and BSR. Results are checked before they are timed;
bench/gpu_timing.py says how. A path that fails is missing from its row, with the reason in the
report. Report and figures are written after every case, so that a run that is ended keeps what it
has. `bench/gpu.sh` builds, tests and runs this in one go.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import sparsekit as sk
from bench import case, gpu_peers, gpu_timing
from bench.command import console, positive, size
from bench.gpu_cases import REGIMES, Job, jobs, quick
from bench.gpu_report import COPY, DENSE, OURS, SPARSE, Result, Run, Timed, percentile, save, tables
from bench.gpu_timing import Call, Stopwatch, Turns, first_line
from bench.timing import Rivals, contenders, rounds_within, scout
from sparsekit import _native, testing
from sparsekit.demo.report import rich_table

# A GPU's bandwidth for copies does not grow beyond this size.
_COPIED_BYTES = 1 << 30

# Ours is held to the package's rule. Of the others it is asked whether they compute the same thing:
# relative error in the Euclidean norm, from rounding the result and, in cuBLAS, parts of it.
_PEER_ERROR = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Layer:
    """A random pruned layer on the GPU, and its packed weight."""

    weight: Tensor
    packed: sk.PackedWeight


def _random(shape: tuple[int, int], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


@cache
def random_layer(n: int, k: int, pattern: str, dtype: torch.dtype, device: torch.device) -> Layer:
    """A layer; those of all cases fit into the memory of a large GPU together."""
    weight = _random((n, k), 0, dtype, device)
    mask = sk.mask(weight, pattern)
    weight.masked_fill_(~mask, 0)
    return Layer(weight, sk.pack(weight, pattern, mask))


def public_path(packed: sk.PackedWeight, x: Tensor) -> gpu_timing.Path:
    """The call a user makes."""

    def make() -> Call:
        copy = sk.PackedWeight(packed.data.clone(), packed.meta)
        return lambda: sk.linear(x, copy)

    return gpu_timing.Path(make, packed.data.nbytes)


def forced_path(kernel: str, packed: sk.PackedWeight, x: Tensor) -> gpu_timing.Path:
    """One kernel by its id, with nothing around it."""
    header = packed.meta.header
    info = _native.cuda_info(x.device.index)
    # Calls on one stream may share it.
    workspace = torch.zeros(info["workspace_bytes"], dtype=torch.uint8, device=x.device)

    def make() -> Call:
        data = packed.data.clone()

        def call() -> Tensor:
            y = x.new_empty(x.shape[0], packed.matrix_shape[0])
            stream = torch.cuda.current_stream().cuda_stream
            gpu = _native.GpuCall(header, stream, workspace)
            _native.matmul(x, data, y, kernel=kernel, gpu=gpu)
            return y

        return call

    return gpu_timing.Path(make, packed.data.nbytes)


def candidates(packed: sk.PackedWeight, m: int, device: torch.device, most: int) -> list[str]:
    """Ids of the kernels that can run a problem: the chosen one, then by estimated cost."""
    n, k = packed.matrix_shape
    answers = _native.explain(packed.format, packed.pattern, packed.dtype, n, k, m, device)
    able = [answer for answer in answers if answer.ok]
    able.sort(key=lambda answer: (not answer.chosen, answer.cost_us or 0.0))
    return [answer.kernel for answer in able[:most]]


class Reference:
    """Some rows of a case's result in float64; the first and the last one are among them."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        m = x.shape[0]
        rows = torch.randperm(m, generator=torch.Generator().manual_seed(m))[:_CHECKED_ROWS]
        self._rows = torch.cat([rows, torch.tensor([0, m - 1])]).to(x.device)
        self._y = testing.reference(x[self._rows], weight)
        self._limit = _PEER_ERROR[x.dtype]
        self._shape = (m, weight.shape[0])

    def check(self, y: Tensor) -> None:
        """Raises AssertionError unless y is the result, up to rounding."""
        assert y.shape == self._shape, f"shape {list(y.shape)}, expected {list(self._shape)}"
        assert bool(y.isfinite().all()), "the result holds a NaN or an infinity"
        error = float((y[self._rows].double() - self._y).norm() / self._y.norm())
        assert error <= self._limit, f"the relative error is {error:.2g}, above {self._limit:g}"


def poisoned(call: Call) -> Tensor:
    """The result of a call that finds NaN in the memory its result is likely to get."""
    poison = call().fill_(torch.nan)
    del poison
    return call()


class Bench:
    """Measures cases.

    Args:
        device: The GPU.
        watch: For all times.
        options: Of the command line: rounds, case_seconds, kernels and compile_seconds.
    """

    def __init__(self, device: torch.device, watch: Stopwatch, options: argparse.Namespace) -> None:
        self._device, self._watch, self._options = device, watch, options
        self._compiler = gpu_peers.Compiler(options.compile_seconds)
        self._copy = Turns(gpu_timing.copy_path(_COPIED_BYTES, device), watch)

    def measure(self, job: Job, failures: list[str]) -> Result:
        """One case.

        Args:
            job: What to measure.
            failures: Gets a line for each forced kernel that fails or computes something else.

        Raises:
            AssertionError: The result of the public call is wrong.
        """
        dtype = job.regime.dtype
        layer = random_layer(job.n, job.k, job.regime.pattern, dtype, self._device)
        weight, packed = layer.weight, layer.packed
        x = _random((job.m, job.k), 1, dtype, self._device)
        reference = Reference(x, weight)
        kernels = candidates(packed, job.m, self._device, self._options.kernels)

        def check(y: Tensor) -> None:
            case.check(y, x, weight, None)

        turns: dict[str, Turns] = {OURS: self._turns(public_path(packed, x), check)}
        unavailable: dict[str, str] = {}
        for kernel in kernels:
            try:
                turns[kernel] = self._turns(forced_path(kernel, packed, x), check)
            except Exception as error:
                torch.cuda.synchronize()  # raises where the GPU itself failed
                failures.append(f"{job.name}, {kernel} forced: {first_line(error)}")
        for name, build in gpu_peers.peers(job, self._watch, self._compiler).items():
            try:
                turns[name] = self._turns(build(weight, x), reference.check)
            except Exception as error:
                torch.cuda.synchronize()
                unavailable[name] = first_line(error)
        for name, path in turns.items():
            if not path.captured:
                unavailable[name] = f"timed without a graph: {path.reason}"
        if job.m <= 16:
            turns[COPY] = self._copy
        return self._timed(job, kernels, turns, unavailable)

    def _turns(self, path: gpu_timing.Path, check: Callable[[Tensor], None]) -> Turns:
        check(poisoned(path.make()))
        return Turns(path, self._watch, check)

    def _timed(
        self,
        job: Job,
        kernels: Sequence[str],
        turns: Mapping[str, Turns],
        unavailable: dict[str, str],
    ) -> Result:
        scouted = scout(turns)
        racing = {OURS, COPY, *SPARSE, *kernels[:1]}
        racing |= {*contenders(scouted, kernels), *contenders(scouted, DENSE)}
        rivals = Rivals({name: path for name, path in turns.items() if name in racing})
        start = time.perf_counter()
        rivals.run_round()
        round_s = time.perf_counter() - start
        most = self._options.rounds
        rivals.run(rounds_within(self._options.case_seconds, round_s, at_most=most) - 1)
        times = {name: rivals.seconds.get(name, [scouted[name]]) for name in turns}
        paths = {
            name: timed(seconds, turns[name].captured)
            for name, seconds in times.items()
            if name != COPY
        }
        speedup = {}
        for name in (*DENSE, *SPARSE):
            if name in rivals.seconds:
                speedup[name] = rivals.speedup(OURS, name)
            elif name in times:
                speedup[name] = scouted[name] / median(times[OURS])
        copied = 2 * _COPIED_BYTES / median(times[COPY]) / 1e9 if COPY in times else None
        return Result(
            regime=job.regime.name,
            pattern=job.regime.pattern,
            dtype=job.dtype,
            m=job.m,
            n=job.n,
            k=job.k,
            kernel=kernels[0],
            paths=paths,
            speedup=speedup,
            unavailable=unavailable,
            bytes_moved=job.bytes_moved,
            copy_gbytes_per_s=copied,
            instruction=job.instruction,
            instruction_operations=job.instruction_operations,
        )


def timed(seconds: Sequence[float], captured: bool) -> Timed:
    """A path's times, in microseconds."""
    us = [1e6 * one for one in seconds]
    return Timed(median(us), percentile(us, 0.1), percentile(us, 0.9), len(us), captured)


_SMI = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def parse_smi(text: str) -> dict[str, str]:
    """The answer of nvidia-smi to a query of `_SMI`, by short names; {} where it has none."""
    first = next(iter(text.strip().splitlines()), "")
    values = [value.strip() for value in first.split(",")]
    if len(values) != len(_SMI):
        return {}
    names = ("driver", "SM clock", "memory clock", "power", "temperature")
    units = ("", " MHz", " MHz", " W", " °C")
    return {
        name: value + unit
        for name, value, unit in zip(names, values, units, strict=True)
        if not value.startswith("[")
    }


def gpu_state() -> dict[str, str]:
    """Clocks and the like, as nvidia-smi shows them."""
    query = [
        "nvidia-smi",
        f"--id={torch.cuda.current_device()}",
        f"--query-gpu={','.join(_SMI)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_smi(answer.stdout)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--regimes", nargs="+", default=["*"], metavar="GLOB", help="names, or globs over them")
    add("--shapes", nargs="+", type=size, metavar="NxK", help="instead of the regimes' own")
    add("--rows", nargs="+", type=positive, metavar="M", help="only these values of m")
    add("--quick", action="store_true", help="a few cases of each regime, few rounds")
    add("--rounds", type=positive, help="most rounds of a case (21; quick: 7)")
    add("--case-seconds", type=float, default=0.4, help="time budget of a case's rounds")
    add("--kernels", type=positive, default=6, help="how many kernels a case forces, at most")
    add("--compile-seconds", type=float, default=90.0, help="time budget of torch.compile; 0: none")
    add("--seconds", type=float, default=float("inf"), help="start no case after so many seconds")
    add("--rates", type=Path, help="what bench/micro/mma_rate.cu printed")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    add("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(given)
    names = [regime.name for regime in REGIMES]
    for glob in options.regimes:
        if not fnmatch.filter(names, glob):
            parser.error(f"--regimes: {glob!r} matches none of {', '.join(names)}")
    if options.quick and options.shapes:
        parser.error("--quick has shapes of its own; leave out --shapes or --quick")
    options.rounds = options.rounds or (7 if options.quick else 21)
    return options


def chosen_jobs(options: argparse.Namespace) -> list[Job]:
    """The cases a command line asks for, in the order to measure."""
    regimes = [
        regime
        for regime in REGIMES
        if any(fnmatch.fnmatchcase(regime.name, glob) for glob in options.regimes)
    ]
    found: Iterable[Job]
    if options.quick:
        found = [job for job in quick(regimes) if options.rows is None or job.m in options.rows]
    else:
        found = jobs(regimes, options.shapes, options.rows)
    return list(found)


def read_rates(path: Path | None) -> list[dict[str, Any]]:
    """The rows of `mma_rate`; none where it has not run."""
    if path is None or not path.is_file() or not path.stat().st_size:
        return []
    rates: list[dict[str, Any]] = json.loads(path.read_text())["rates"]
    return rates


def line(result: Result) -> str:
    """A case in a line, for the screen."""
    dense = result.fastest_dense
    against = f"{result.speedup[dense]:.2f}x {dense}" if dense else "no dense path"
    others = [f"{result.speedup[name]:.2f}x {name}" for name in SPARSE if name in result.speedup]
    share = result.bandwidth_share
    rate = f"{share:.0%} of copy" if share else f"{result.tflops:.0f} TFLOP/s"
    return f"{result.regime} {result.problem}: {result.us:.1f} µs, {rate}, " + ", ".join(
        [against, *others]
    )


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    todo = chosen_jobs(options)
    screen = console()
    if options.list:
        for job in todo:
            screen.print(job.name, highlight=False)
        return
    if not todo:
        sys.exit("nothing to measure: no case has these regimes, shapes and rows together")
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no GPU here; `python -m bench.regimes` measures the CPU")
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    bench = Bench(device, Stopwatch(properties.L2_cache_size), options)
    run = Run(
        date=datetime.date.today().isoformat(),
        gpu=properties.name,
        arch=f"sm{properties.major}{properties.minor}",
        sm_count=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        software={"sparsekit": _native.build_info()["version"], **gpu_peers.versions()},
        before=gpu_state(),
        after={},
        rates=read_rates(options.rates),
    )
    with torch.no_grad():
        for at, job in enumerate(todo):
            if time.monotonic() - start > options.seconds:
                run.left_out.extend(left.name for left in todo[at:])
                break
            try:
                result = bench.measure(job, run.failures)
                run.results.append(result)
                screen.print(line(result), highlight=False, markup=False, soft_wrap=True)
            except Exception as error:
                run.failures.append(f"{job.name}: {first_line(error)}")
                screen.print(run.failures[-1], highlight=False, markup=False, soft_wrap=True)
                if not gpu_works():
                    run.failures.append("the GPU failed: the cases after this one are missing")
                    break
            if run.results:
                save(run, options.out)
    run.after.update(gpu_state())
    for table in tables(run):
        screen.print(rich_table(table))
    paths = save(run, options.out)
    screen.print(f"wrote {' and '.join(map(str, paths))}", soft_wrap=True)
    if run.failures:
        sys.exit(1)


def gpu_works() -> bool:
    """After an illegal access nothing on this GPU works in this process any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
