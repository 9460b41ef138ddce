"""What a regimes run says: one row per regime and thread count, one per case, wins and losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean

from bench.report import markdown_table, save_run, stem
from bench.timing import HOPELESS, SCOUTING
from sparsekit.demo.report import Table

LOSS = 0.95
"""Below this ratio to dense, a case must be one that `convert` keeps dense."""


@dataclass(frozen=True)
class Result:
    """A measured case.

    Attributes:
        counts: Part of the regime's mean.
        speedup: The fastest dense path's time over ours, median over the rounds.
        dense_ms: Median milliseconds of the dense paths; of slow ones from a turn or a few.
        peers_ms: Of the sparse engines, likewise.
        unavailable: Paths that could not run it, and why.
        gate_speedup: What `convert`'s gate measured, of losses alone.
        gate_keeps_dense: And whether it keeps the layer dense.
        gbytes_per_s: Compressed bytes over our time, where weights stream.
        bandwidth_share: The same over the measured read bandwidth.
        layer: What m, n and k do not tell of a convolution.
    """

    regime: str
    pattern: str
    dtype: str
    m: int
    n: int
    k: int
    threads: int
    counts: bool
    kernel: str
    ms: float
    speedup: float
    fastest_dense: str
    dense_ms: dict[str, float]
    peers_ms: dict[str, float]
    unavailable: dict[str, str]
    gate_speedup: float | None
    gate_keeps_dense: bool | None
    gbytes_per_s: float | None
    bandwidth_share: float | None
    layer: str = ""

    @property
    def problem(self) -> str:
        return f"{self.pattern} {self.layer or f'm={self.m} {self.n}x{self.k}'}"

    @property
    def verdict(self) -> str:
        """Of a loss, what the gate does; else nothing."""
        if self.gate_speedup is None:
            return ""
        kept = "dense" if self.gate_keeps_dense else "SPARSE"
        return f"gate keeps {kept} ({self.gate_speedup:.2f}x)"


@dataclass(frozen=True)
class Run:
    """Where and when, what was promised, and what came out.

    Attributes:
        goals: Goal, if there is one, and limit by regime.
        bandwidth: What the read bandwidth is.
        failures: Cases without a figure, and why.
        title: Of the report.
    """

    date: str
    cpu: str
    isa: str
    torch: str
    goals: dict[str, tuple[float | None, float]]
    bandwidth: str
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    title: str = "Regimes"


_NONE = "–"


def _by_regime(run: Run) -> Iterable[tuple[str, int, list[Result]]]:
    threads = sorted({result.threads for result in run.results})
    for name in run.goals:
        for count in threads:
            found = [r for r in run.results if (r.regime, r.threads) == (name, count)]
            if found:
                yield name, count, found


def _ratio(values: Sequence[float]) -> str:
    return f"{geometric_mean(values):.2f}x" if values else _NONE


def _table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()
) -> Table:
    """A table without the columns that nobody has an entry in."""
    kept = [at for at in range(len(head)) if any(row[at] != _NONE for row in rows)]
    found = [tuple(row[at] for at in kept) for row in rows]
    return Table(title, tuple(head[at] for at in kept), found, list(marks))


def summary(run: Run) -> Table:
    """One row per regime and number of threads."""
    rows, marks = [], []
    for name, threads, found in _by_regime(run):
        goal, limit = run.goals[name]
        counting = [result for result in found if result.counts]
        mean = geometric_mean([r.speedup for r in counting]) if counting else 0.0
        worst = min(found, key=lambda result: result.speedup)
        losses = [result for result in found if result.speedup < LOSS]
        rates = [r.gbytes_per_s for r in found if r.gbytes_per_s is not None]
        shares = [r.bandwidth_share for r in found if r.bandwidth_share is not None]
        rows.append(
            (
                name,
                str(threads),
                str(len(found)),
                f"{goal:.2f}x" if goal else _NONE,
                f"{mean:.2f}x" if counting else _NONE,
                f"{limit:.2f}x",
                f"{mean / limit:.0%}" if counting else _NONE,
                worst.problem,
                f"{worst.speedup:.2f}x",
                str(len(losses)),
                str(sum(bool(result.gate_keeps_dense) for result in losses)),
                _ratio([r.speedup for r in found if not r.counts]),
                f"{geometric_mean(rates):.1f}" if rates else _NONE,
                f"{geometric_mean(shares):.0%}" if shares else _NONE,
            )
        )
        judged = goal is not None and counting
        marks.append(("win" if mean >= (goal or 0) else "loss") if judged else "")
    head = (
        *("regime", ">threads", ">cases", ">goal", ">mean", ">limit", ">of the limit"),
        *("worst case", ">worst", f">below {LOSS}x", ">of these kept dense", ">m=16"),
        *(">GB/s", ">of read bandwidth"),
    )
    return _table(run.title, head, rows, marks)


def peers(run: Run) -> Table:
    """Each sparse engine beside the fastest dense path and beside ours, per regime."""
    rows = []
    for name, threads, found in _by_regime(run):
        for engine in sorted({engine for result in found for engine in result.peers_ms}):
            cases = [r for r in found if r.counts and engine in r.peers_ms]
            if cases:
                theirs = [r.dense_ms[r.fastest_dense] / r.peers_ms[engine] for r in cases]
                ours = [r.peers_ms[engine] / r.ms for r in cases]
                row = (name, str(threads), engine, str(len(cases)), _ratio(theirs), _ratio(ours))
                rows.append(row)
    head = ("regime", ">threads", "engine", ">cases", ">over fastest dense", ">ours over it")
    return _table("Sparse engines", head, rows)


def cases(run: Run) -> Table:
    """One row per case, in the order they were measured."""
    dense = list(dict.fromkeys(name for r in run.results for name in r.dense_ms))
    sparse = list(dict.fromkeys(name for r in run.results for name in r.peers_ms))
    rows = []
    for result in run.results:
        others = {**result.dense_ms, **result.peers_ms}
        won = result.speedup >= 1
        note = result.verdict
        if result.bandwidth_share is not None:
            note = f"{result.gbytes_per_s:.1f} GB/s, {result.bandwidth_share:.0%}  {note}".strip()
        rows.append(
            (
                result.regime,
                result.pattern,
                result.layer or _NONE,
                *map(str, (result.m, result.n, result.k, result.threads)),
                f"`{result.kernel}`",
                f"{result.ms:.3f}",
                *(f"{others[name]:.3f}" if name in others else _NONE for name in dense + sparse),
                f"**{result.speedup:.2f}x**" if won else f"{result.speedup:.2f}x (loss)",
                note,
            )
        )
    head = (
        *("regime", "pattern", "layer", ">m", ">n", ">k", ">threads", "kernel", ">ms"),
        *(f">{name}" for name in dense + sparse),
        *(">speedup", "note"),
    )
    return _table("Cases", head, rows)


def tables(run: Run) -> list[Table]:
    """What the screen shows: everything but the single cases."""
    found = [summary(run), peers(run)]
    return [table for table in found if table.rows]


def markdown(run: Run) -> str:
    """The report's text."""
    lines = [
        f"# {run.title}: {run.cpu}, {run.isa}, {run.date}",
        "",
        f"torch {run.torch}. `speedup` is the fastest dense path's time over ours in the same "
        "round, median of the interleaved rounds; a path that is more than "
        f"{HOPELESS} times slower than the fastest dense one is given the least of {SCOUTING} "
        "turns or fewer. `mean` is the geometric one over the cases that count"
        f"{'' if all(result.counts for result in run.results) else ', m=16 does not'}. Of each "
        "case below "
        f"{LOSS}x it is measured what `convert` would do. Our results were checked against float64 "
        "before they were timed.",
        "",
    ]
    if any(result.bandwidth_share is not None for result in run.results):
        lines += [f"GB/s count compressed values and positions; {run.bandwidth}.", ""]
    for table in (*tables(run), cases(run)):
        lines += markdown_table(table)
    if run.failures:
        lines += ["## Without a figure", "", *(f"- {failure}" for failure in run.failures), ""]
    return "\n".join(lines)


def save(run: Run, folder: Path) -> tuple[Path, Path]:
    """Writes the report and the figures; returns both paths."""
    name = f"{stem(run.date, run.cpu, run.isa)}-{run.title.lower()}"
    return save_run(folder, name, markdown(run), asdict(run))
