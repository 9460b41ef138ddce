"""Renders the JSON of a benchmark run as a markdown table and a plot: wins and losses alike.

python -m bench.report build/bench.json --out bench/results
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.demo.report import Table


@dataclass(frozen=True)
class Row:
    """One measured case: a layer at a batch size with a pattern, and what ran beside it.

    Attributes:
        speedup: Fastest dense time over ours, median of the rounds; below 1 is a loss.
        rivals_ms: Median milliseconds of every baseline that could run.
        gflops: Operations of the dense product over our time.
        forced: The kernel was asked for by name, not chosen.
    """

    shape: str
    m: int
    n: int
    k: int
    pattern: str
    dtype: str
    kernel: str
    forced: bool
    threads: int
    ms: float
    gflops: float
    speedup: float
    fastest_dense: str
    rivals_ms: dict[str, float]

    @property
    def label(self) -> str:
        return f"{self.shape} m={self.m} {self.pattern} {self.dtype}"


@dataclass(frozen=True)
class Run:
    """A benchmark file: its rows, worst case first, and where and when it was measured."""

    date: str
    cpu: str
    isa: str
    threads: int
    torch: str
    rows: tuple[Row, ...]

    @property
    def stem(self) -> str:
        return stem(self.date, self.cpu, self.isa)


def stem(date: str, cpu: str, isa: str) -> str:
    """What every result file's name begins with."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu} {isa}".lower()).strip("-")
    return f"{date}-{slug}"


def read(path: Path) -> Run:
    """Reads a file written by `pytest --benchmark-json`.

    Raises:
        ValueError: The file holds no case of this suite.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    cases = [entry for entry in content["benchmarks"] if "speedup" in entry["extra_info"]]
    if not cases:
        raise ValueError(
            f"{path}: expected cases of bench/test_matmul.py, found none; "
            "write it with: pytest bench --benchmark-only --benchmark-json=FILE"
        )
    rows = []
    for case in cases:
        info = case["extra_info"]
        rows.append(Row(**{field: info[field] for field in Row.__dataclass_fields__}))
    machine = cases[0]["extra_info"]["machine"]
    return Run(
        date=content["datetime"][:10],
        cpu=machine["cpu"],
        isa=machine["isa"],
        threads=rows[0].threads,
        torch=machine["torch"],
        rows=tuple(sorted(rows, key=lambda row: row.speedup)),
    )


def markdown_table(table: Table) -> list[str]:
    """Lines of a table with its heading."""
    rules = ["---:" if column.startswith(">") else "---" for column in table.columns]
    lines = [[column.lstrip(">") for column in table.columns], rules, *table.rows]
    note = [table.note, ""] if table.note else []
    return [f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", *note]


def save_run(folder: Path, name: str, text: str, figures: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes a run's report as markdown and its figures as JSON; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.md", folder / f"{name}.json"
    paths[0].write_text(text)
    paths[1].write_text(json.dumps(figures, indent=1) + "\n")
    return paths


def _table(rows: Iterable[Row], rivals: Sequence[str]) -> list[str]:
    head = [
        "layer",
        "m",
        "n",
        "k",
        "pattern",
        "dtype",
        "kernel",
        "ms",
        "GFLOP/s",
        *rivals,
        "speedup",
    ]
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(["---"] + ["---:"] * 3 + ["---"] * 3 + ["---:"] * (len(head) - 7)) + "|",
    ]
    for row in rows:
        others = [f"{row.rivals_ms[r]:.3f}" if r in row.rivals_ms else "–" for r in rivals]
        verdict = f"**{row.speedup:.2f}x**" if row.speedup >= 1 else f"{row.speedup:.2f}x (loss)"
        cells = [row.shape, row.m, row.n, row.k, row.pattern, row.dtype, f"`{row.kernel}`"]
        cells += [f"{row.ms:.3f}", f"{row.gflops:.0f}", *others, verdict]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def markdown(run: Run, plot: str | None = None) -> str:
    """The report's text. `plot` is the picture's file name, relative to the text."""
    rivals = sorted({name for row in run.rows for name in row.rivals_ms})
    chosen = [row for row in run.rows if not row.forced]
    forced = [row for row in run.rows if row.forced]
    lost = sum(row.speedup < 1 for row in chosen)
    lines = [
        f"# {run.cpu}, {run.isa}, {run.threads} threads, {run.date}",
        "",
        f"torch {run.torch}. Milliseconds are medians of interleaved rounds; GFLOP/s count the "
        "dense operations. `speedup` is the fastest dense path's time over ours in the same "
        "round, median of the rounds. Our results were checked against float64 before they were "
        "timed.",
        "",
        f"{len(chosen)} cases: {len(chosen) - lost} faster than the fastest dense path, "
        f"{lost} slower.",
        "",
    ]
    if plot:
        lines += [f"![speedup of every case]({plot})", ""]
    if chosen:
        lines += ["## The kernel the package chooses", "", *_table(chosen, rivals), ""]
    if forced:
        lines += ["## Every kernel this machine can run", "", *_table(forced, rivals), ""]
    return "\n".join(lines)


def plot(run: Run, path: Path) -> None:
    """Draws one bar per case the package chose, losses in another colour, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in run.rows if not row.forced] or list(run.rows)
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = ["#2a7f62" if row.speedup >= 1 else "#c0392b" for row in rows]
    axes.barh([row.label for row in rows], [row.speedup for row in rows], color=colors)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("speedup over the fastest dense path (below 1: slower)")
    axes.set_title(f"{run.cpu}, {run.isa}, {run.threads} threads, {run.date}")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="file written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="output folder")
    options = parser.parse_args(arguments)
    run = read(options.json)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / f"{run.stem}.png"
    plot(run, picture)
    text = options.out / f"{run.stem}.md"
    text.write_text(markdown(run, picture.name))
    print(f"wrote {text} and {picture}")


if __name__ == "__main__":
    main()
