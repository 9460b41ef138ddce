"""What a GPU run says: goals beside results, one row per regime, one per case; wins and losses.

python -m bench.gpu_report build/gpu/2026-11-30-nvidia-h200-sm90-gpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench.gpu_cases import BANDWIDTH, FASTEST_DENSE, GOALS, INSTRUCTION_RATE, Goal
from bench.report import markdown_table, save_run, stem
from sparsekit.demo.report import Table

OURS = "sparsekit"
"""The public call with the kernel that the package chooses."""

DENSE = ("cuBLAS", "cuBLASLt", "torch.compile")
SPARSE = ("cuSPARSELt", "torch CUTLASS", "torch BSR")
COPY = "copy"

# Losses below this are noise.
_LOSS = 0.98


@dataclass(frozen=True)
class Timed:
    """Microseconds of one path's calls.

    Attributes:
        us: Median over the rounds.
        p10: A tenth of the rounds were as fast or faster.
        p90: A tenth were as slow or slower.
        rounds: How many; slow paths have fewer.
        captured: They ran in a CUDA graph.
    """

    us: float
    p10: float
    p90: float
    rounds: int
    captured: bool


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values does not exceed, by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Result:
    """A measured case.

    Attributes:
        kernel: Id of the kernel the package chooses.
        paths: Ours, the kernels forced by their ids, and the peers.
        speedup: Of each peer, its time over ours, median over the rounds both took part in.
        unavailable: Paths that could not run it, or not in a graph, and why.
        bytes_moved: The fewest bytes of a call.
        copy_gbytes_per_s: Bytes read and written by a copy in the same rounds, where it was timed.
        instruction: What multiplies.
        instruction_operations: Operations as that instruction's rate counts them.
    """

    regime: str
    pattern: str
    dtype: str
    m: int
    n: int
    k: int
    kernel: str
    paths: dict[str, Timed]
    speedup: dict[str, float]
    unavailable: dict[str, str]
    bytes_moved: int
    copy_gbytes_per_s: float | None
    instruction: str
    instruction_operations: int

    @property
    def problem(self) -> str:
        return f"m={self.m} {self.n}x{self.k}"

    @property
    def us(self) -> float:
        return self.paths[OURS].us

    @property
    def fastest_dense(self) -> str | None:
        found = [name for name in DENSE if name in self.speedup]
        return min(found, key=lambda name: self.speedup[name], default=None)

    @property
    def tflops(self) -> float:
        """Operations of the dense product over our time."""
        return 2 * self.m * self.n * self.k / self.us / 1e6

    @property
    def gbytes_per_s(self) -> float:
        return self.bytes_moved / self.us / 1e3

    @property
    def bandwidth_share(self) -> float | None:
        return self.gbytes_per_s / self.copy_gbytes_per_s if self.copy_gbytes_per_s else None

    @property
    def forced(self) -> dict[str, Timed]:
        """The kernels that were forced, the fastest first."""
        found = {name: timed for name, timed in self.paths.items() if name.startswith("matmul_")}
        return dict(sorted(found.items(), key=lambda item: item[1].us))

    @property
    def choice(self) -> float | None:
        """Time of the chosen kernel over that of the fastest one."""
        forced = self.forced
        if self.kernel not in forced:
            return None
        return forced[self.kernel].us / next(iter(forced.values())).us

    @property
    def around(self) -> float | None:
        """Time of the public call over that of its kernel, forced: what is done around it."""
        forced = self.forced
        return self.us / forced[self.kernel].us if self.kernel in forced else None


@dataclass(frozen=True)
class Run:
    """Where and when, with which rates, and what came out.

    Attributes:
        gpu: Its name.
        arch: E.g. "sm90".
        software: Versions by name.
        before: Clocks and the like before the run, by name.
        after: The same right after it.
        rates: Rows of `mma_rate`.
        failures: Cases without a figure, and why.
        left_out: Cases for which there was no time.
    """

    date: str
    gpu: str
    arch: str
    sm_count: int
    l2_bytes: int
    software: dict[str, str]
    before: dict[str, str]
    after: dict[str, str]
    rates: list[dict[str, Any]]
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def rate(self, instruction: str, dtype: str) -> float | None:
        """TFLOP/s of an instruction on registers, with the number of warps that suits it best."""
        found = [
            float(row["tflops"])
            for row in self.rates
            if (row["instruction"], row["dtype"]) == (instruction, dtype)
            and not row["shared_loads"]
        ]
        return max(found, default=None)

    def rate_share(self, result: Result) -> float | None:
        """Of the instruction's rate, what a case gives."""
        rate = self.rate(result.instruction, result.dtype)
        return result.instruction_operations / result.us / 1e6 / rate if rate else None


def read(path: Path) -> Run:
    """A run's figures from its JSON.

    Raises:
        ValueError: The file is none of this suite.
    """
    content = json.loads(path.read_text())
    try:
        results = [
            Result(**{**row, "paths": {name: Timed(**t) for name, t in row["paths"].items()}})
            for row in content["results"]
        ]
        return Run(**{**content, "results": results})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected what bench.gpu writes, got another file ({error})"
        ) from None


def reached(run: Run, result: Result, over: str) -> float | None:
    """What a case gives for a goal, see `Goal.over`."""
    if over == FASTEST_DENSE:
        dense = result.fastest_dense
        return None if dense is None else result.speedup[dense]
    if over == BANDWIDTH:
        return result.bandwidth_share
    if over == INSTRUCTION_RATE:
        return run.rate_share(result)
    return result.speedup.get(over)


def _shown(value: float, over: str) -> str:
    return f"{value:.0%}" if over in (BANDWIDTH, INSTRUCTION_RATE) else f"{value:.2f}x"


def goals(run: Run, promised: Iterable[Goal] = GOALS) -> Table:
    """One row per goal that the run has cases of."""
    rows, marks = [], []
    for goal in promised:
        found = [
            (value, result)
            for result in run.results
            if result.regime == goal.regime and goal.counts(result.n, result.k, result.m)
            for value in [reached(run, result, goal.over)]
            if value is not None
        ]
        if not found:
            continue
        mean = geometric_mean([value for value, _ in found])
        worst, case = min(found, key=lambda pair: pair[0])
        rows.append(
            (
                goal.regime,
                goal.over,
                goal.cases,
                str(len(found)),
                _shown(goal.least, goal.over),
                _shown(mean, goal.over),
                "reached" if mean >= goal.least else "missed",
                f"{_shown(worst, goal.over)} ({case.problem})",
            )
        )
        marks.append("win" if mean >= goal.least else "loss")
    head = ("regime", "over", "cases", ">number", ">goal", ">mean", "", "lowest")
    return Table("Goals", head, rows, marks)


def _rate(run: Run, result: Result) -> float | None:
    """The share of the instruction's rate, where memory is not what limits."""
    return run.rate_share(result) if result.copy_gbytes_per_s is None else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return geometric_mean(known) if known else None


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def regimes(run: Run) -> Table:
    """One row per regime: the geometric means over its cases."""
    rows = []
    for name in dict.fromkeys(result.regime for result in run.results):
        found = [result for result in run.results if result.regime == name]
        dense = [(value, r) for r in found if (value := reached(run, r, FASTEST_DENSE)) is not None]
        worst, case = min(dense, key=lambda pair: pair[0], default=(None, None))
        over = [_mean(r.speedup.get(peer) for r in found) for peer in SPARSE]
        rows.append(
            (
                name,
                str(len(found)),
                _cell(_mean(value for value, _ in dense), ".2f"),
                f"{_cell(worst, '.2f')} ({case.problem})" if case else "–",
                str(sum(value < _LOSS for value, _ in dense)),
                *(_cell(mean, ".2f") for mean in over),
                _cell(_mean(r.bandwidth_share for r in found), ".0%"),
                _cell(_mean(_rate(run, r) for r in found), ".0%"),
                _cell(_mean(r.around for r in found), ".2f"),
                _cell(_mean(r.choice for r in found), ".2f"),
                _cell(max((r.choice for r in found if r.choice), default=None), ".2f"),
            )
        )
    head = (
        *("regime", ">cases", f">over {FASTEST_DENSE}", "lowest", ">losses"),
        *(f">over {peer}" for peer in SPARSE),
        *(">of copy bandwidth", ">of the instruction's rate"),
        *(">call / its kernel", ">chosen / fastest kernel", ">most"),
    )
    return Table("Regimes", head, rows)


def rates(run: Run) -> Table:
    """What the tensor cores gave on registers and with operands from shared memory."""
    rows = [
        (
            str(row["instruction"]),
            str(row["dtype"]),
            "shared memory" if row["shared_loads"] else "registers",
            str(row["warps_per_sm"]),
            f"{row['tflops']:.0f}",
            f"{row['flops_per_clock_per_sm']:.0f}",
        )
        for row in run.rates
    ]
    head = ("instruction", "dtype", "operands", ">warps an SM", ">TFLOP/s", ">a clock and SM")
    return Table("Instructions", head, rows, note="Operations of the dense product.")


def cases(run: Run) -> Table:
    """One row per case, in the order they were measured."""
    peers = [
        name for name in (*DENSE, *SPARSE) if any(name in result.paths for result in run.results)
    ]
    rows = []
    for result in run.results:
        ours = result.paths[OURS]
        ratio = reached(run, result, FASTEST_DENSE)
        verdict = "–" if ratio is None else f"**{ratio:.2f}x**"
        if ratio is not None and ratio < 1:
            verdict = f"{ratio:.2f}x (loss)"
        rows.append(
            (
                result.regime,
                *map(str, (result.m, result.n, result.k)),
                f"`{result.kernel}`",
                f"{ours.us:.1f} ({ours.p10:.1f} to {ours.p90:.1f}, {ours.rounds})",
                *(_peer(result, name) for name in peers),
                verdict,
                f"{result.tflops:.0f}",
                _cell(_rate(run, result), ".0%"),
                f"{result.gbytes_per_s:.0f}",
                _cell(result.bandwidth_share, ".0%"),
            )
        )
    head = (
        *("regime", ">m", ">n", ">k", "kernel", ">µs (p10 to p90, rounds)"),
        *(f">{name}" for name in peers),
        *(f">over {FASTEST_DENSE}", ">TFLOP/s", ">of the rate", ">GB/s", ">of copy"),
    )
    return Table("Cases", head, rows)


def _peer(result: Result, name: str) -> str:
    if name not in result.paths:
        return "failed" if name in result.unavailable else "–"
    timed = result.paths[name]
    return f"{timed.us:.1f}" + ("" if timed.captured else " (no graph)")


def kernels(run: Run) -> Table:
    """How every kernel did where it could run, beside the one the package chose."""
    rows = [
        (
            result.regime,
            *map(str, (result.m, result.n, result.k)),
            _cell(result.choice, ".2f"),
            ", ".join(
                f"**{_variant(name)} {timed.us:.1f}**"
                if name == result.kernel
                else f"{_variant(name)} {timed.us:.1f}"
                for name, timed in result.forced.items()
            ),
        )
        for result in run.results
        if result.forced
    ]
    head = ("regime", ">m", ">n", ">k", ">chosen / fastest", "µs of each tile, the chosen one bold")
    return Table("Choice of the kernel", head, rows)


def _variant(kernel: str) -> str:
    return kernel.rsplit("_", 1)[-1]


def unavailable(run: Run) -> list[str]:
    """Each reason once, with the number of cases."""
    counts: dict[tuple[str, str], int] = {}
    for result in run.results:
        for name, reason in result.unavailable.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return [f"{name}: {reason} ({count} cases)" for (name, reason), count in counts.items()]


def tables(run: Run) -> list[Table]:
    """What the screen shows: everything but the single cases."""
    return [table for table in (goals(run), regimes(run), rates(run)) if table.rows]


def _facts(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items()) or "unknown"


def markdown(run: Run) -> str:
    """The report's text."""
    lines = [
        f"# {run.gpu} ({run.arch}), {run.date}",
        "",
        f"{run.sm_count} SMs, {run.l2_bytes / 2**20:.0f} MiB of L2; {_facts(run.software)}. "
        f"Before the run: {_facts(run.before)}; after it: {_facts(run.after)}.",
        "",
        "Times are medians of interleaved rounds in microseconds; a call's time is that of a CUDA "
        "graph of many calls over their number. Weights are not in L2 when a call begins: calls go "
        "round copies of them, together several times its size. Results were checked against "
        "float64 first. Ratios are the other path's time over ours in the same round, median of "
        "the rounds; means are geometric ones.",
        "",
    ]
    for table in tables(run):
        lines += markdown_table(table)
    for title, entries in (
        ("Could not run", unavailable(run)),
        ("Without a figure", run.failures),
        ("No time left for", run.left_out),
    ):
        if entries:
            lines += [f"## {title}", "", *(f"- {entry}" for entry in entries), ""]
    for table in (cases(run), kernels(run)):
        if table.rows:
            lines += markdown_table(table)
    return "\n".join(lines)


def save(run: Run, folder: Path) -> tuple[Path, Path]:
    """Writes the report and the figures; returns both paths."""
    name = f"{stem(run.date, run.gpu, run.arch)}-gpu"
    return save_run(folder, name, markdown(run), asdict(run))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("json", type=Path, help="file written by bench.gpu")
    options = parser.parse_args(arguments)
    run = read(options.json)
    print(f"wrote {' and '.join(map(str, save(run, options.json.parent)))}")


if __name__ == "__main__":
    main()
