"""What a run of whole models says: one row per model and pattern, and every engine's time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.report import markdown_table, save_run, stem
from bench.timing import HOPELESS, SCOUTING
from sparsekit.demo.report import Table

TOKENS = 128
"""Of every text."""


@dataclass(frozen=True)
class Result:
    """One model, pattern, element type, batch size and number of threads.

    Attributes:
        goal: What is promised of `speedup`, if anything.
        speedup: The fastest dense engine's time over that of our fastest, median over the rounds.
        ours: Our fastest engine.
        engines_ms: Median milliseconds of every engine; of slow ones from a turn or a few.
        sparse_layers: Layers that `convert` made sparse.
        layers: Layers that were pruned.
        skipped: Engines that could not run, and why.
        peak_mib: The most memory that a process held which ran our eager engine alone.
        dense_peak_mib: The same of torch's dense eager engine, channels_last.
    """

    model: str
    pattern: str
    dtype: str
    batch: int
    threads: int
    goal: float | None
    speedup: float
    ours: str
    fastest_dense: str
    engines_ms: dict[str, float]
    sparse_layers: int
    layers: int
    skipped: dict[str, str]
    peak_mib: float | None = None
    dense_peak_mib: float | None = None


@dataclass(frozen=True)
class Run:
    """Where and when, and what came out."""

    date: str
    cpu: str
    isa: str
    torch: str
    rounds: int
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def summary(run: Run) -> Table:
    """One row per result."""
    rows, marks = [], []
    for r in run.results:
        theirs = r.engines_ms.get("DeepSparse")
        ms = r.engines_ms[r.ours]
        rows.append(
            (
                r.model,
                r.pattern,
                r.dtype,
                str(r.batch),
                str(r.threads),
                f"{r.sparse_layers} of {r.layers}",
                f"{r.engines_ms[r.fastest_dense]:.2f}",
                r.fastest_dense,
                f"{theirs:.2f}" if theirs else "–",
                f"{ms:.2f}",
                r.ours,
                f"{r.goal:.2f}x" if r.goal else "–",
                f"{r.speedup:.2f}x" + (" (loss)" if r.speedup < 1 else ""),
                f"{theirs / ms:.2f}x" if theirs else "–",
                f"{r.peak_mib:.0f} ({r.dense_peak_mib:.0f})" if r.peak_mib else "–",
            )
        )
        marks.append("" if r.goal is None else "win" if r.speedup >= r.goal else "loss")
    head = (
        *("model", "pattern", "dtype", ">batch", ">threads", ">sparse layers", ">dense [ms]"),
        *("fastest dense", ">DeepSparse [ms]", ">ours [ms]", "ours", ">goal"),
        *(">over dense", ">over DeepSparse", ">peak MiB (dense)"),
    )
    return Table("Whole models", head, rows, marks)


def _engine_tables(run: Run) -> Iterator[Table]:
    """Every engine's time, one table per model and element type."""
    for model, dtype in dict.fromkeys((r.model, r.dtype) for r in run.results):
        found = [r for r in run.results if (r.model, r.dtype) == (model, dtype)]
        names = list(dict.fromkeys(name for r in found for name in (*r.engines_ms, *r.skipped)))
        names = [n for n in names if any(n in r.engines_ms for r in found)]
        rows = [
            (
                name,
                *(f"{r.engines_ms[name]:.2f}" if name in r.engines_ms else "–" for r in found),
            )
            for name in names
        ]
        head = [f">{r.pattern}, batch {r.batch}, {r.threads} threads" for r in found]
        reasons = {f"{n}: {why}" for r in found for n, why in r.skipped.items()}
        note = f"Left out: {'; '.join(sorted(reasons))}." if reasons else ""
        yield Table(f"{model}, {dtype}, milliseconds", ("engine", *head), rows, note=note)


def markdown(run: Run) -> str:
    """The report's text."""
    lines = [
        f"# Whole models: {run.cpu}, {run.isa}, {run.date}",
        "",
        f"torch {run.torch}. Median milliseconds of {run.rounds} interleaved rounds; an engine "
        f"that is more than {HOPELESS} times slower than the fastest of its kind is given the "
        f"least of {SCOUTING} turns or fewer. Texts have {TOKENS} tokens. Weights are pruned by "
        "magnitude; `sparse layers` are those that `convert` did not keep dense. bfloat16 is "
        "compared with dense float32 engines "
        "as well. `over dense` is the fastest dense engine's time over ours in the same round, "
        "median of the rounds. Networks of convolutions run with their batch normalisations "
        "folded in every engine, and ours gets NHWC, as torch's `channels_last` do. `peak MiB` is "
        "the high-water mark of the resident memory of a process that runs our eager engine "
        "alone, beside torch's dense eager one in channels_last; what Python and the libraries "
        "take is in both.",
        "",
    ]
    for table in (summary(run), *_engine_tables(run)):
        lines += markdown_table(table)
    if run.failures:
        lines += ["## Without a figure", "", *(f"- {failure}" for failure in run.failures), ""]
    return "\n".join(lines)


def save(run: Run, folder: Path) -> tuple[Path, Path]:
    """Writes the report and the figures; returns both paths."""
    name = f"{stem(run.date, run.cpu, run.isa)}-models"
    return save_run(folder, name, markdown(run), asdict(run))
