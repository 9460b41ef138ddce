"""What pruning takes: memory for a model that stays on disk, and time for one layer.

    python -m bench.prune_scale [--layers 64] [--size 4096] [--tokens 4096] [--kill]
    python -m bench.prune_scale --solve [--sizes 512 1024 2048 4096]

The first writes a stack of square bfloat16 layers with random weights to a temporary folder and
prunes it by SparseGPT with `prune_file` in a process whose memory is sampled. With `--kill` a
second process does the same and is killed half-way, a third one goes on from there, and the
checkpoints must be equal bit for bit. The second times the parts of the work on one float32 layer.
The tables are printed and written as markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bench.case import machine
from bench.command import console, positive
from bench.memory import high_water_mib
from bench.report import markdown_table, save_run, stem
from sparsekit.demo.report import Table, rich_table
from sparsekit.patterns import parse_pattern
from sparsekit.prune import METHODS, prune_file
from sparsekit.prune.reconstruct import (
    ReconstructionOptions,
    _inverse_root,
    least_squares,
    sweep,
)

_ROOT = Path(__file__).parents[1]
_MIB = 1 << 20
_SAMPLE_S = 0.02
_LAYERS_PER_FILE = 8
# A step that is expected to take longer is left out.
_LIMIT_S = 240.0
_REPEATED_S = 30.0


class Block(nn.Module):
    """`x + linear(relu(norm(x)))`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(functional.relu(functional.rms_norm(x, x.shape[-1:])))


class Stack(nn.Module):
    """Any number of equal blocks."""

    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def write_source(folder: Path, layers: int, size: int) -> None:
    """Shards of random weights, a few layers each: never more than these in memory."""
    folder.mkdir()
    make = torch.Generator().manual_seed(0)
    for first in range(0, layers, _LAYERS_PER_FILE):
        shard = {
            f"blocks.{layer}.linear.weight": (
                torch.randn(size, size, generator=make, dtype=torch.float32) / size**0.5
            ).bfloat16()
            for layer in range(first, min(layers, first + _LAYERS_PER_FILE))
        }
        save_file(shard, folder / f"{first:05}.safetensors", {"format": "pt"})


def prune_stack(source: Path, out: Path, layers: int, size: int, tokens: int) -> dict[str, Any]:
    """Prunes the stack in this process; what it took and what it began with."""
    with torch.device("meta"):
        model = Stack(layers, size).bfloat16()
    make = torch.Generator().manual_seed(1)
    batches = list(torch.randn(tokens, size, generator=make).bfloat16().split(512))
    torch.linalg.cholesky(torch.eye(64))  # the libraries' own memory is not the pruning's
    before = status_mib("self", "RssAnon")
    report = prune_file(
        model,
        sorted(source.iterdir()),
        out,
        "2:4",
        "sparsegpt",
        calibration=batches,
        progress=sys.stderr.isatty(),
    )
    return {
        "anonymous_before_mib": before,
        "high_water_mib": high_water_mib(),
        "seconds": report.seconds,
        "solve_seconds": median(layer.seconds for layer in report.layers),
    }


def status_mib(process: int | str, field: str) -> float:
    """A line of /proc/<process>/status; 0 once the process is gone."""
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def run_worker(
    arguments: Sequence[str], kill: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Runs `prune_stack` in a process of its own and samples its anonymous memory.

    Args:
        arguments: of the worker.
        kill: when it is true the process is killed.

    Returns:
        What the worker measured, and the peak of what was sampled; None if it was killed.
    """
    command = [sys.executable, "-m", "bench.prune_scale", "--worker", *arguments]
    peak = 0.0
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as worker:
        while worker.poll() is None:
            peak = max(peak, status_mib(worker.pid, "RssAnon"))
            if kill():
                worker.send_signal(signal.SIGKILL)
                return None
            time.sleep(_SAMPLE_S)
        assert worker.stdout is not None
        text = worker.stdout.read()
    if worker.returncode:
        sys.exit(f"the process that prunes ended with {worker.returncode}")
    measured: dict[str, Any] = json.loads(text)
    return measured | {"anonymous_peak_mib": peak}


def measure_memory(layers: int, size: int, tokens: int, kill: bool) -> dict[str, Any]:
    """Prunes a stack in temporary files.

    Raises:
        AssertionError: A run that was killed ends at other weights.
        SystemExit: The disk is too small, or a process failed.
    """
    with tempfile.TemporaryDirectory(prefix="sparsekit-") as name:
        folder = Path(name)
        source, out = folder / "source", folder / "out"
        write_source(source, layers, size)
        given = [str(source), str(out), str(layers), str(size), str(tokens)]
        result = run_worker(given)
        assert result is not None
        result["model_mib"] = sum(path.stat().st_size for path in source.iterdir()) / _MIB
        if kill:
            other = folder / "killed"
            given[1] = str(other)

            def half_way() -> bool:
                return len(list(other.glob("model-*"))) >= max(1, layers // 2)

            assert run_worker(given, half_way) is None, "the run ended before it was killed"
            resumed = run_worker(given)
            assert resumed is not None
            result["resumed_seconds"] = resumed["seconds"]
            for path in out.glob("model-*"):
                found, expected = load_file(other / path.name), load_file(path)
                assert found.keys() == expected.keys()
                for tensor in expected:
                    assert torch.equal(found[tensor], expected[tensor]), f"{tensor} differs"
        return result


def measure_solve(size: int, known: dict[str, tuple[int, float]]) -> dict[str, float | None]:
    """Seconds of each part of the work on a layer `[size, size]`.

    Args:
        size: The layer's n and k.
        known: Of each part, a smaller size and its time: the next is expected from it.
    """
    torch.manual_seed(size)
    weight, tokens = torch.randn(size, size), torch.randn(1000, size)
    moment = torch.zeros(size, size).addmm_(tokens.t(), tokens).div_(1000)
    pattern, options = parse_pattern("2:4"), ReconstructionOptions()
    score = METHODS["sparsegpt"].score
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "moment": (2, lambda: moment.addmm_(tokens.t(), tokens, beta=0.999, alpha=1e-6)),
        "factorisation": (3, lambda: _inverse_root(moment, options)),
        "sweep": (3, lambda: sweep(weight, pattern, score, moment, options)),
        "least_squares": (4, lambda: least_squares(weight, pattern, score, moment, options)),
    }
    out: dict[str, float | None] = {}
    for name, (power, call) in calls.items():
        smaller, took = known.get(name, (size, 0.0))
        if took * (size / smaller) ** power > _LIMIT_S:
            out[name] = None
            continue
        out[name] = seconds = _timed(call)
        known[name] = size, seconds
    return out


def _timed(call: Callable[[], object]) -> float:
    """The best of three calls, for others use the machine too; of a long one, one."""
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < _REPEATED_S):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_table(options: argparse.Namespace, result: dict[str, Any]) -> Table:
    """What a run took."""
    growth = result["anonymous_peak_mib"] - result["anonymous_before_mib"]
    rows = [
        ("layers", f"{options.layers} of {options.size}x{options.size}, bfloat16"),
        ("model on disk", f"{result['model_mib']:,.0f} MiB"),
        ("anonymous memory before", f"{result['anonymous_before_mib']:,.0f} MiB"),
        ("its peak while pruning", f"{result['anonymous_peak_mib']:,.0f} MiB (+{growth:,.0f})"),
        ("peak with mapped files (VmHWM)", f"{result['high_water_mib']:,.0f} MiB"),
        ("time", f"{result['seconds']:,.0f} s"),
        ("of a layer's solve, median", f"{result['solve_seconds']:.1f} s"),
    ]
    if "resumed_seconds" in result:
        rows.append(
            ("killed half-way and resumed", f"equal bits; {result['resumed_seconds']:,.0f} s more")
        )
    return Table("Pruning from disk to disk", ("", ">"), rows)


def solve_table(results: dict[int, dict[str, float | None]]) -> Table:
    """One row per size."""
    rows = [
        (str(size), *("-" if s is None else f"{s:.3f}" if s < 1 else f"{s:.1f}" for s in parts))
        for size, parts in ((size, result.values()) for size, result in results.items())
    ]
    head = (">n = k", ">moment", ">factorisation", ">sweep", ">least_squares")
    return Table("Seconds for one layer, 2:4", head, rows)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.prune_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=positive, default=64)
    add("--size", type=positive, default=4096, help="in and out features of a layer")
    add("--tokens", type=positive, default=4096, help="of calibration")
    add("--kill", action="store_true", help="also kill a run and compare how it ends")
    add("--solve", action="store_true", help="time the work on one layer instead")
    add("--sizes", type=positive, nargs="+", default=[512, 1024, 2048, 4096], metavar="SIZE")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    add("--worker", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if options.worker:
        source, out, *sizes = options.worker
        print(json.dumps(prune_stack(Path(source), Path(out), *map(int, sizes))))
        return
    where = machine()
    date = datetime.date.today().isoformat()
    setting = f"torch {where['torch']}, {where['cpu']}, threads: {torch.get_num_threads()}."
    figures: dict[str, Any] = {"date": date, **where, "threads": torch.get_num_threads()}
    if options.solve:
        known: dict[str, tuple[int, float]] = {}
        solved = {size: measure_solve(size, known) for size in sorted(options.sizes)}
        found = solve_table(solved)
        figures["solve"] = solved
        title, suffix = "Time to prune a layer", "prune-solve"
        text = (
            f"{setting} float32, the best of up to three calls. Moment: adding the second moment "
            "of 1000 tokens. Factorisation: the Cholesky factor of the inverse. Sweep: SparseGPT, "
            "its factorisation included. least_squares: the exact refit, its sweep included."
        )
    else:
        result = measure_memory(options.layers, options.size, options.tokens, options.kill)
        found = memory_table(options, result)
        figures |= {"layers": options.layers, "size": options.size, "tokens": options.tokens}
        figures["result"] = result
        title, suffix = "Pruning a model that stays on disk", "prune-scale"
        text = (
            f"{setting} SparseGPT to 2:4 with {options.tokens} tokens. Anonymous memory cannot be "
            "given back by the system; the pages of mapped files, which VmHWM counts as well, can."
        )
    screen = console()
    screen.print(rich_table(found))
    lines = [f"# {title}: {date}", "", text, "", *markdown_table(found)]
    name = f"{stem(date, where['cpu'], where['isa'])}-{suffix}"
    paths = save_run(options.out, name, "\n".join(lines), figures)
    screen.print(f"wrote {' and '.join(map(str, paths))}", soft_wrap=True)


if __name__ == "__main__":
    main()
