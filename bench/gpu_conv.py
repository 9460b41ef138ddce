"""Convolutions on a GPU: ours against cuDNN, in interleaved rounds of one run.

    python -m bench.gpu_conv --out build/gpu [--layers '3x3-512*'] [--patterns 2:4]

ResNet-like 3x3 layers in float16 and `channels_last`, at batch sizes that fill the GPU and at one
image. cuDNN chooses its algorithm by measurement. Results are checked before they are timed;
bench/gpu_timing.py says how. Every kernel that can run is forced once, too. The table is written as
markdown and JSON after every case. `bench/gpu.sh` runs this after `bench.gpu`.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

import sparsekit as sk
from bench.case import Layer
from bench.command import console
from bench.conv_case import ConvCase, ConvLayer, random_filters
from bench.gpu_timing import Call, Stopwatch, Turns, first_line
from bench.gpu_timing import Path as TimedPath
from bench.report import markdown_table
from bench.timing import Rivals, rounds_within
from sparsekit import _native, _ops
from sparsekit.demo.report import Table, rich_table

OURS, DENSE = "sparsekit", "cuDNN"
GOAL = 1.3
"""Geometric mean over cuDNN promised for 2:4, with 256 channels and more."""

PATTERNS = ("2:4", "bsr64x64@0.75", "bsr64x64@0.9", "bsr16x16@0.75")
LAYERS = tuple(
    ConvLayer("resnet", channels, channels, 3, side)
    for channels, side in ((64, 56), (128, 28), (256, 14), (256, 56), (512, 7), (512, 28))
)
BATCHES = (1, 64)

# Both round sums of up to thousands of products to 11 bits; a wrong kernel is off by far more.
_ERROR = 4e-3


@dataclass(frozen=True)
class Result:
    """One case: microseconds of each path, its median over the rounds.

    Attributes:
        speedup: Of ours over cuDNN, median over the rounds of the ratio in a round.
        unavailable: Paths that failed or could not be captured, and why.
    """

    layer: str
    batch: int
    pattern: str
    kernel: str
    us: dict[str, float]
    speedup: float
    unavailable: dict[str, str]


def cases(layers: Sequence[str], patterns: Sequence[str]) -> list[ConvCase]:
    """Those whose names match, in the order to measure.

    Args:
        layers: Globs over names such as "3x3-256-256-at-14".
        patterns: Globs over `PATTERNS`.
    """
    return [
        ConvCase(layer, batch, pattern, torch.float16)
        for pattern in PATTERNS
        if any(fnmatch.fnmatchcase(pattern, glob) for glob in patterns)
        for layer in LAYERS
        if any(fnmatch.fnmatchcase(layer.name, glob) for glob in layers)
        for batch in BATCHES
    ]


class Paths:
    """The ways to compute a case on a device."""

    def __init__(self, case: ConvCase, device: torch.device) -> None:
        filters: Layer = random_filters(case.layer, case.pattern, case.dtype)
        self._case = case
        self._weight = filters.weight.to(device, memory_format=torch.channels_last)
        self._bias = filters.bias.to(device)
        self._packed = sk.pack(self._weight, case.pattern, self._weight != 0)
        generator = torch.Generator().manual_seed(1)
        side = case.layer.side
        x = torch.randn(case.batch, case.layer.inputs, side, side, generator=generator)
        self._x = x.to(device, case.dtype).contiguous(memory_format=torch.channels_last)
        self._padding = case.layer.kernel // 2
        self._expected = functional.conv2d(
            self._x.float(), self._weight.float(), self._bias.float(), 1, self._padding
        ).relu()

    def kernels(self) -> list[str]:
        """Ids of those that can run, the chosen one first, then by estimated cost."""
        n, k = self._packed.matrix_shape
        answers = _native.explain(
            self._packed.format,
            self._packed.pattern,
            self._packed.dtype,
            n,
            k,
            self._case.m,
            self._x.device,
            op="conv2d",
        )
        able = [answer for answer in answers if answer.ok]
        able.sort(key=lambda answer: (not answer.chosen, answer.cost_us or 0.0))
        return [answer.kernel for answer in able]

    def check(self, y: Tensor) -> None:
        """Raises AssertionError unless y is the result, up to rounding."""
        error = float((y.float() - self._expected).norm() / self._expected.norm())
        assert error <= _ERROR, f"the relative error is {error:.2g}, above {_ERROR:g}"

    def ours(self) -> TimedPath:
        """The call a user makes."""

        def make() -> Call:
            copy = sk.PackedWeight(self._packed.data.clone(), self._packed.meta)
            return lambda: sk.conv2d(
                self._x, copy, self._bias, padding=self._padding, activation="relu"
            )

        return TimedPath(make, self._packed.nbytes)

    def forced(self, kernel: str) -> TimedPath:
        """One kernel by its id."""
        layer, packed, around = self._case.layer, self._packed, self._padding
        header = packed.meta.header if self._x.is_cuda else None

        def make() -> Call:
            data = packed.data.clone()
            return lambda: _ops.conv2d(
                self._x,
                data,
                layer.outputs,
                [layer.kernel] * 2,
                [1, 1],
                [around] * 4,
                [1, 1],
                1,
                layer.inputs,
                self._bias,
                "relu",
                None,
                False,
                kernel,
                header,
            )

        return TimedPath(make, packed.nbytes)

    def dense(self) -> TimedPath:
        """cuDNN as torch calls it, bias and activation in kernels of their own."""

        def make() -> Call:
            weight = self._weight.clone(memory_format=torch.preserve_format)
            return lambda: functional.conv2d(self._x, weight, self._bias, 1, self._padding).relu_()

        return TimedPath(make, self._weight.nbytes)


def measure(
    case: ConvCase,
    device: torch.device,
    turns: Callable[[TimedPath, Callable[[Tensor], None]], Turns],
    seconds: float,
) -> Result:
    """One case.

    Args:
        turns: Makes a path ready to be timed.
        seconds: Time budget of the rounds.

    Raises:
        AssertionError: Our result, or cuDNN's, is wrong.
    """
    paths = Paths(case, device)
    kernels = paths.kernels()
    ready: dict[str, Turns] = {}
    unavailable: dict[str, str] = {}
    for name, path in ((OURS, paths.ours()), (DENSE, paths.dense())):
        paths.check(path.make()())
        ready[name] = turns(path, paths.check)
    for kernel in kernels:
        try:
            path = paths.forced(kernel)
            paths.check(path.make()())
            ready[kernel] = turns(path, paths.check)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            unavailable[kernel] = first_line(error)
    unavailable |= {
        name: f"timed without a graph: {one.reason}"
        for name, one in ready.items()
        if not one.captured
    }
    rivals = Rivals(ready)
    start = time.perf_counter()
    rivals.run_round()
    rivals.run(rounds_within(seconds, time.perf_counter() - start) - 1)
    return Result(
        layer=case.layer.name,
        batch=case.batch,
        pattern=case.pattern,
        kernel=kernels[0] if kernels else "",
        us={name: 1e6 * median(times) for name, times in rivals.seconds.items()},
        speedup=rivals.speedup(OURS, DENSE),
        unavailable=unavailable,
    )


def mean_speedups(results: Sequence[Result]) -> dict[str, float]:
    """Geometric mean of each pattern over the layers with 256 channels and more."""
    found: dict[str, list[float]] = {}
    for result in results:
        if int(result.layer.split("-")[1]) >= 256:
            found.setdefault(result.pattern, []).append(result.speedup)
    return {name: math.exp(sum(map(math.log, all_)) / len(all_)) for name, all_ in found.items()}


def table(results: Sequence[Result], gpu: str) -> Table:
    """All cases; times in microseconds."""
    rows, marks = [], []
    for result in results:
        forced = {
            name: us for name, us in result.us.items() if name not in (OURS, DENSE, result.kernel)
        }
        best = min(forced, key=forced.__getitem__, default="")
        rows.append(
            (
                f"{result.layer}, batch {result.batch}",
                result.pattern,
                result.kernel,
                f"{result.us[OURS]:.1f}",
                f"{result.us[DENSE]:.1f}",
                f"{result.speedup:.2f}x",
                f"{best} {forced[best]:.1f}" if best else "-",
            )
        )
        marks.append("win" if result.speedup > 1 else "loss")
    columns = ("layer", "pattern", "kernel", ">us", ">cuDNN us", ">speed", "best other kernel, us")
    return Table(f"Convolutions, float16, {gpu}", columns, rows, marks)


def save(results: Sequence[Result], gpu: str, arch: str, folder: Path) -> tuple[Path, Path]:
    """Writes the table and the figures; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    stem = f"{date}-{'-'.join(gpu.lower().split())}-{arch}-conv"
    found = table(results, gpu)
    lines = [f"# {found.title}, {date}", "", f"torch {torch.__version__}.", ""]
    lines += markdown_table(found)
    lines += ["", f"Geometric means over 256 channels and more (2:4 is to reach {GOAL}x):", ""]
    lines += [f"- {name}: {mean:.2f}x" for name, mean in mean_speedups(results).items()]
    missing = [
        f"- {result.layer}, batch {result.batch}, {result.pattern}, {name}: {reason}"
        for result in results
        for name, reason in result.unavailable.items()
    ]
    lines += ["", "Missing or timed otherwise:", "", *missing] if missing else []
    markdown, figures = folder / f"{stem}.md", folder / f"{stem}.json"
    markdown.write_text("\n".join(lines) + "\n")
    figures.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return markdown, figures


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_conv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", nargs="+", default=["*"], metavar="GLOB", help="names, or globs over them")
    add("--patterns", nargs="+", default=["*"], metavar="GLOB")
    add("--case-seconds", type=float, default=0.3, help="time budget of a case's rounds")
    add("--seconds", type=float, default=math.inf, help="start no case after so many seconds")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    add("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(given)
    if not cases(options.layers, options.patterns):
        parser.error("no case has these layers and patterns; --list shows all")
    return options


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    todo = cases(options.layers, options.patterns)
    screen = console()
    if options.list:
        for case in todo:
            screen.print(case.name, highlight=False)
        return
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_conv: torch sees no GPU here; `make conv-layers` measures the CPU")
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    watch = Stopwatch(properties.L2_cache_size)
    arch = f"sm{properties.major}{properties.minor}"
    results: list[Result] = []
    failures: list[str] = []
    start = time.monotonic()
    with torch.no_grad():
        for case in todo:
            if time.monotonic() - start > options.seconds:
                failures.append(f"out of time before {case.name}")
                break
            try:
                results.append(
                    measure(
                        case,
                        device,
                        lambda path, check: Turns(path, watch, check),
                        options.case_seconds,
                    )
                )
            except Exception as error:
                failures.append(f"{case.name}: {first_line(error)}")
                screen.print(failures[-1], highlight=False, markup=False, soft_wrap=True)
            if results:
                save(results, properties.name, arch, options.out)
    if results:
        screen.print(rich_table(table(results, properties.name)))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
