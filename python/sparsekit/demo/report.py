"""The report for people: one self-contained HTML page, and the same tables on the screen.

Both show `report.json` and nothing else: a table is made once, as rows of text, and rendered twice.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as markup
from rich.table import Table as RichTable

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #20262e; background: #fff; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #d9dde2; padding: 0.25rem 0.8rem; text-align: left;
  vertical-align: top; }
th { background: #f2f4f6; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.win td { background: #e6f4ec; }
tr.loss td { background: #fae8e6; }
img { max-width: 100%; }
.quick { background: #fff3cd; border: 1px solid #e0c36a; padding: 0.6rem 1rem; }
"""

_PREFIX = "bert.encoder.layer."

QUICK_NOTE = (
    "Quick run: few recovery steps, few timing rounds, no torch.compile. "
    "Its figures show that everything works, not what can be reached."
)


@dataclass(frozen=True)
class Table:
    """Rows of text with a heading.

    Attributes:
        title: What it shows.
        columns: Headings; a leading ">" right-aligns the column.
        rows: Cells.
        marks: One of "win", "loss", "" per row.
        note: A sentence below.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    marks: Sequence[str] = ()
    note: str = ""


def tables(report: dict[str, Any]) -> list[Table]:
    """The report's tables, from the most to the least important."""
    return [
        _quality(report),
        *(_latency(latency) for latency in report["latency"].values()),
        _files(report),
        _layers(report),
        _pruning(report),
        _corpus(report),
        _seconds(report),
        _machine(report),
    ]


def summary(report: dict[str, Any]) -> list[str]:
    """The result in a few sentences."""
    quality, files, fresh = report["quality"], report["files"], report["fresh_process"]
    lines = []
    for latency in report["latency"].values():
        lines.append(
            f"Batch {latency['batch']} of {latency['tokens']} tokens: {latency['fastest_sparse']} "
            f"runs at {latency['sparse_vs_eager']:.2f}x the speed of torch eager float32 and "
            f"{latency['sparse_vs_fastest_dense']:.2f}x that of the fastest dense engine, "
            f"{latency['fastest_dense']}."
        )
    dense, final = quality["dense"], quality["converted"]
    lines.append(
        f"Retrieval: recall@1 {_percent(dense['recall_at_1'])} dense, "
        f"{_percent(final['recall_at_1'])} sparse; recall@10 {_percent(dense['recall_at_10'])} and "
        f"{_percent(final['recall_at_10'])}; mean cosine to dense {final['cosine']:.3f}."
    )
    lines.append(
        f"File: {_megabytes(files['dense_bytes'])} dense, {_megabytes(files['sparse_bytes'])} "
        f"sparse ({files['ratio']:.2f}x smaller)."
    )
    verdict = "equal, bit for bit" if fresh["equal"] else "NOT equal"
    lines.append(
        f"Loaded in a fresh process in {fresh['load_seconds']:.2f} s: {fresh['texts']} embeddings "
        f"{verdict} (largest difference {fresh['max_abs_difference']:.1e})."
    )
    return lines


def html(report: dict[str, Any], png: bytes) -> str:
    """The page.

    Args:
        report: As in `report.json`.
        png: The picture, embedded as a data URI.

    Returns:
        HTML5 without any reference to another file or host.
    """
    image = base64.b64encode(png).decode()
    quick = f'<p class="quick">{escape(QUICK_NOTE)}</p>' if report["quick"] else ""
    points = "".join(f"<li>{escape(line)}</li>" for line in summary(report))
    body = "".join(_html_table(table) for table in tables(report))
    title = escape(_title(report))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_CSS}</style></head><body><h1>{title}</h1>{quick}<ul>{points}</ul>"
        f'<img alt="Latency, layers, quality and size" src="data:image/png;base64,{image}">'
        f"{body}</body></html>\n"
    )


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the tables and the summary."""
    if report["quick"]:
        console.print(QUICK_NOTE, style="bold yellow")
    for table in reversed(tables(report)):
        console.print(rich_table(table))
        if table.note:
            console.print(markup(table.note), style="italic")
    for line in summary(report):
        console.print(markup(line), style="bold")


def _title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return (
        f"sparsekit demo: {settings['model']}, {settings['pattern']} by {settings['method']}, "
        f"{settings['dtype']}"
    )


def _quality(report: dict[str, Any]) -> Table:
    rows = [
        (
            stage,
            _percent(values["recall_at_1"]),
            _percent(values["recall_at_10"]),
            f"{values['cosine']:.3f}",
        )
        for stage, values in report["quality"].items()
    ]
    return Table(
        "Quality on the test half",
        ("model", ">recall@1", ">recall@10", ">cosine to dense"),
        rows,
        note="The first paragraph of a docstring must find the rest of it among all of the half.",
    )


def _latency(latency: dict[str, Any]) -> Table:
    rows, marks = [], []
    best = next(r["ms"] for r in latency["engines"] if r["name"] == latency["fastest_dense"])
    for row in latency["engines"]:
        fastest = " (fastest dense)" if row["name"] == latency["fastest_dense"] else ""
        if "skipped" in row:
            rows.append((row["name"], "", "", "", f"skipped: {row['skipped']}"))
            marks.append("")
            continue
        spread = f"{row['ms_low']:.1f} to {row['ms_high']:.1f}"
        cells = (f"{row['ms']:.1f}", spread, f"{row['speedup']:.2f}x")
        rows.append((row["name"] + fastest, *cells, ""))
        marks.append("" if not row["sparse"] else "win" if row["ms"] < best else "loss")
    return Table(
        f"End to end, batch {latency['batch']} of {latency['tokens']} tokens",
        ("engine", ">median [ms]", ">quartiles [ms]", ">speed over torch eager", "note"),
        rows,
        marks,
        note=f"{latency['rounds']} interleaved rounds. Best sparse: "
        f"{latency['sparse_vs_eager']:.2f}x torch eager float32, "
        f"{latency['sparse_vs_fastest_dense']:.2f}x the fastest dense engine.",
    )


def _files(report: dict[str, Any]) -> Table:
    files, fresh = report["files"], report["fresh_process"]
    dtype = report["settings"]["dtype"]
    rows = [
        (f"whole model, dense {dtype}", _megabytes(files["dense_bytes"])),
        ("whole model, sparse", _megabytes(files["sparse_bytes"])),
        ("smaller by", f"{files['ratio']:.2f}x"),
        (f"encoder Linears, dense {dtype}", _megabytes(files["dense_linear_bytes"])),
        ("encoder Linears, sparse", _megabytes(files["sparse_linear_bytes"])),
        ("smaller by", f"{files['linear_ratio']:.2f}x"),
        ("loading in a fresh process", f"{fresh['load_seconds']:.2f} s"),
        ("texts embedded there", str(fresh["texts"])),
        ("equal to this process's", "yes, bit for bit" if fresh["equal"] else "NO"),
        ("largest difference", f"{fresh['max_abs_difference']:.1e}"),
    ]
    return Table("Files (safetensors)", ("what", ">figure"), rows)


def _layers(report: dict[str, Any]) -> Table:
    rows, marks = [], []
    for layer in report["layers"]:
        timed = layer["speedup"] is not None
        rows.append(
            (
                layer["name"].removeprefix(_PREFIX),
                "×".join(str(size) for size in layer["shape"]),
                f"{layer['dense_ms']:.3f}" if timed else "",
                f"{layer['sparse_ms']:.3f}" if timed else "",
                f"{layer['speedup']:.2f}x" if timed else "",
                layer["kernel"] or "",
                layer["verdict"] + (f" + {layer['activation']}" if layer["activation"] else ""),
                layer["reason"],
            )
        )
        marks.append("" if not timed else "win" if layer["verdict"] == "sparse" else "loss")
    columns = (">dense [ms]", ">sparse [ms]", ">speed", "kernel", "verdict", "reason")
    note = f"Names follow {_PREFIX.rstrip('.')}. Layers of one shape share one measurement."
    return Table("Layers", ("layer", "n×k", *columns), rows, marks, note)


def _pruning(report: dict[str, Any]) -> Table:
    pruning, recovery = report["pruning"], report["recovery"]
    rows = [
        ("reconstruction of the kept weights", pruning["reconstruction"]),
        ("pruned Linears", str(pruning["layers"])),
        ("zeros in them", _percent(pruning["sparsity"])),
        ("mean relative error of a layer's output", f"{pruning['mean_error']:.4f}"),
        ("largest relative error", f"{pruning['max_error']:.4f}"),
        ("calibration texts", str(pruning["texts"])),
        ("recovery texts", str(recovery["texts"])),
        ("recovery steps", str(recovery["steps"])),
        ("loss of the first step", f"{recovery['first_loss']:.4f}"),
        ("loss of the last step", f"{recovery['last_loss']:.4f}"),
    ]
    return Table("Pruning and recovery", ("what", ">figure"), rows)


def _corpus(report: dict[str, Any]) -> Table:
    corpus = report["corpus"]
    rows = [
        ("docstrings", str(corpus["docstrings"])),
        ("public and longer than 120 characters", str(corpus["candidates"])),
        ("pairs for calibration and recovery", str(corpus["calibration_pairs"])),
        ("pairs for the test", str(corpus["test_pairs"])),
        ("SHA-256 of texts and split", corpus["sha256"]),
    ]
    return Table("Text: Python's standard library", ("what", ">figure"), rows)


def _seconds(report: dict[str, Any]) -> Table:
    rows = [(stage, f"{seconds:.1f}") for stage, seconds in report["seconds"].items()]
    return Table("Time of the demo itself", ("stage", ">seconds"), rows)


def _machine(report: dict[str, Any]) -> Table:
    rows = [(name, str(value)) for name, value in report["machine"].items()]
    return Table("Machine", ("what", "this machine"), rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def _html_table(table: Table) -> str:
    right = [column.startswith(">") for column in table.columns]
    head = "".join(f"<th>{escape(column.lstrip('>'))}</th>" for column in table.columns)
    body = []
    for index, row in enumerate(table.rows):
        mark = table.marks[index] if table.marks else ""
        cells = "".join(
            f'<td class="number">{escape(cell)}</td>' if number else f"<td>{escape(cell)}</td>"
            for cell, number in zip(row, right, strict=True)
        )
        body.append(f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{''.join(body)}</table>{note}"


def rich_table(table: Table) -> RichTable:
    """A table for the screen."""
    styles = {"win": "green", "loss": "red", "": None}
    rich = RichTable(title=table.title, title_justify="left", min_width=len(table.title) + 4)
    for column in table.columns:
        justify = "right" if column.startswith(">") else "left"
        rich.add_column(markup(column.lstrip(">")), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for index, row in enumerate(table.rows):
        rich.add_row(
            *(markup(cell) for cell in row),
            style=styles[table.marks[index]] if table.marks else None,
        )
    return rich
