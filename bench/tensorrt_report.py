"""Renders the JSON of `bench/test_tensorrt.py` as a markdown table: wins and losses alike.

python -m bench.tensorrt_report build/tensorrt.json --out bench/results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import markdown_table, stem
from sparsekit.demo.report import Table


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The date and the cases of a file written by `pytest --benchmark-json`.

    Raises:
        ValueError: it holds no case of this suite.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    cases = [each["extra_info"] for each in content["benchmarks"] if "over" in each["extra_info"]]
    if not cases:
        raise ValueError(
            f"{path}: expected cases of bench/test_tensorrt.py, found none; write it with: "
            "pytest bench/test_tensorrt.py --benchmark-only --benchmark-json=FILE"
        )
    return content["datetime"][:10], cases


def markdown(date: str, cases: Sequence[dict[str, Any]]) -> str:
    """The report's text."""
    rivals = sorted({name for case in cases for name in case["over"]})
    rows = []
    for case in cases:
        cells = [case["model"], case["pattern"], str(case["batch"]), f"{case['ms']['ours']:.3f}"]
        for name in rivals:
            if name in case["over"]:
                ratio = case["over"][name]
                loss = "" if ratio >= 1 else " (loss)"
                cells.append(f"{case['ms'][name]:.3f}, {ratio:.2f}x{loss}")
            else:
                cells.append("failed" if name in case["failed"] else "–")
        rows.append(tuple(cells))
    columns = ("model", "pattern", ">batch", ">ours, ms", *(f">{name}" for name in rivals))
    note = (
        "float16 unless it says int8. Milliseconds are medians of interleaved rounds, each engine "
        "a CUDA graph; a ratio is an engine's time over ours in the same round, median of the "
        "rounds: below 1 we lose. Every engine's result was compared with torch's first."
    )
    failures = [
        f"- {case['model']} {case['pattern']} batch {case['batch']}, {name}: {reason}"
        for case in cases
        for name, reason in case["failed"].items()
    ]
    device, version = cases[0]["device"], cases[0]["tensorrt"]
    lines = [f"# {device}, TensorRT {version}, {date}", ""]
    lines += markdown_table(Table("Whole networks", columns, tuple(rows), note))
    if failures:
        lines += ["## Engines that TensorRT did not build", "", *failures, ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="file written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="output folder")
    options = parser.parse_args(arguments)
    date, cases = read(options.json)
    options.out.mkdir(parents=True, exist_ok=True)
    name = stem(date, cases[0]["device"], f"tensorrt-{cases[0]['tensorrt']}")
    path = options.out / f"{name}.md"
    path.write_text(markdown(date, cases))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
