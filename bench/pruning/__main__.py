"""The command line of the studies."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import bench.pruning
from bench.case import machine
from bench.command import console, positive
from bench.pruning import digits, minilm, pareto, report
from bench.pruning.journal import Journal
from bench.report import markdown_table, save_run, stem
from sparsekit.demo.report import rich_table


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.pruning",
        description=bench.pruning.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=("digits", "minilm", "pareto", "report"))
    add = parser.add_argument
    add("--patterns", nargs="+", metavar="PATTERN", help="instead of all of the study")
    add("--seeds", type=positive, default=3, help="networks of the digits study")
    add("--share", type=_share, default=(0, 1), metavar="I/N", help="of the digits study, from 1/N")
    add("--recovered", nargs="*", default=list(minilm.RECOVERED), metavar="PATTERN")
    add("--steps", type=positive, default=minilm.STEPS, help="of MiniLM's recovery")
    add("--work", type=Path, default=Path("build/pruning"), help="journal and trained models")
    add("--out", type=Path, default=Path("bench/results"), help="folder of the report")
    return parser.parse_args(given)


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"expected I/N such as 1/2, got {text!r}")
    return int(number) - 1, int(of)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    journal = Journal(options.work / "journal.jsonl")
    if options.study == "digits":
        patterns = options.patterns or digits.PATTERNS
        digits.run(journal, patterns, options.seeds, options.work, options.share)
    elif options.study == "minilm":
        minilm.run(
            journal,
            options.patterns or minilm.PATTERNS,
            options.recovered,
            options.steps,
            options.work,
        )
    elif options.study == "pareto":
        pareto.run(journal, options.work)
    else:
        _report(journal, options.out)


def _report(journal: Journal, out: Path) -> None:
    results = list(journal)
    tables = [*report.digits_tables(results), *report.minilm_tables(results)]
    front = report.pareto_table(results)
    screen = console()
    for table in tables:
        screen.print(rich_table(table))
    where = machine()
    date = datetime.date.today().isoformat()
    name = f"{stem(date, where['cpu'], where['isa'])}-pruning"
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{name}-sparsity.png"
    report.plot_sparsity(results, picture)
    pictures = [picture]
    text = [f"# What pruning costs: {date}", "", f"torch {where['torch']}, {where['cpu']}.", ""]
    text += [f"![accuracy against sparsity]({picture.name})", ""]
    if front is not None:
        screen.print(rich_table(front))
        tables.append(front)
        pictures.append(out / f"{name}-latency.png")
        report.plot_pareto(results, pictures[-1])
        text += [f"![accuracy against latency]({pictures[-1].name})", ""]
    for table in tables:
        text += markdown_table(table)
    figures = {"date": date, **where, "results": [{"asked": a, "found": f} for a, f in results]}
    paths = save_run(out, name, "\n".join(text), figures)
    screen.print(f"wrote {', '.join(map(str, (*paths, *pictures)))}", soft_wrap=True)


if __name__ == "__main__":
    main()
