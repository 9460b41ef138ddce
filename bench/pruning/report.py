"""What the studies found, as tables and plots, from the journal alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.pruning.digits import EPOCHS, TUNING_EPOCHS
from sparsekit.demo.report import Table
from sparsekit.patterns import parse_pattern

Results = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]

_WHEN = ("before", "during", "after")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in per cent."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def method_name(asked: Mapping[str, Any]) -> str:
    """A method with what differs from its usual form."""
    parts = [asked["method"], asked.get("reconstruction", "")]
    if asked.get("allocation", "uniform") != "uniform":
        parts.append(asked["allocation"])
    return " + ".join(filter(None, [*parts, "permuted" if asked.get("permuted") else ""]))


def digits_tables(results: Results) -> list[Table]:
    """One table for each time of pruning and stage: methods by patterns."""
    chosen = [(asked, found) for asked, found in results if asked["study"] == "digits"]
    dense = [found["dense"] for _, found in chosen if "dense" in found]
    titles = {
        ("after", "pruned"): "After training, pruned at once",
        ("after", "statistics"): "The same, batch normalisations measured again",
        ("after", "recovered"): f"The same, trained on for {TUNING_EPOCHS} epochs under the masks",
        ("during", "recovered"): f"During training, {EPOCHS} epochs from nothing",
        ("before", "recovered"): f"Before training, then {EPOCHS} epochs under the masks",
    }
    tables = []
    for (when, stage), title in titles.items():
        rows = [(asked, found[stage]) for asked, found in chosen if asked["when"] == when]
        if rows:
            note = f"Dense: {spread(sorted(set(dense)))} %." if dense else ""
            tables.append(_by_pattern(title, rows, note))
    return tables


def minilm_tables(results: Results) -> list[Table]:
    """Cosine to the dense embeddings, then recall, at once and recovered."""
    chosen = [(asked, found) for asked, found in results if asked["study"] == "minilm"]
    at_once = [(asked, found) for asked, found in chosen if not asked["steps"]]
    tables = []
    for key, title in (
        ("cosine", "Pruned at once: mean cosine to the dense embeddings, in per cent"),
        ("recall_at_1", "Pruned at once: recall@1, in per cent"),
        ("error", "Pruned at once: mean error of the layers' outputs, in per cent"),
    ):
        if at_once:
            rows = [(asked, found[key]) for asked, found in at_once]
            tables.append(_by_pattern(title, rows, ""))
    recovered = [(asked, found) for asked, found in chosen if asked["steps"]]
    if recovered:
        head = ("pattern", "method", ">steps", ">recall@1", ">recall@10", ">cosine", ">minutes")
        lines = [
            (
                asked["pattern"],
                method_name(asked),
                str(asked["steps"]),
                f"{100 * found['recall_at_1']:.1f}",
                f"{100 * found['recall_at_10']:.1f}",
                f"{found['cosine']:.3f}",
                f"{found['seconds'] / 60:.0f}",
            )
            for asked, found in recovered
        ]
        tables.append(Table("Recovered by distillation", head, lines))
    return tables


def _by_pattern(title: str, rows: Iterable[tuple[Mapping[str, Any], float]], note: str) -> Table:
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    patterns: dict[str, None] = {}
    methods: dict[str, None] = {}
    for asked, value in rows:
        patterns[asked["pattern"]] = methods[method_name(asked)] = None
        cells[method_name(asked), asked["pattern"]].append(value)
    lines = [
        (method, *(spread(cells[method, pattern]) for pattern in patterns)) for method in methods
    ]
    return Table(title, ("method", *(f">{pattern}" for pattern in patterns)), lines, note=note)


def pareto_points(results: Results) -> dict[str, tuple[float, Mapping[str, Any]]]:
    """Milliseconds and quality of every network that has both; dense engines have none of it."""
    times = {asked["time of"]: found["ms"] for asked, found in results if "time of" in asked}
    quality = {asked["choice"]: found for asked, found in results if "choice" in asked}
    dense: Mapping[str, Any] = {}
    return {name: (ms, quality.get(name, dense)) for name, ms in times.items()}


def pareto_table(results: Results) -> Table | None:
    """The points of the plot, the slowest first; None before they are measured."""
    points = pareto_points(results)
    if not points:
        return None
    fastest = min(ms for ms, quality in points.values() if not quality)
    rows = []
    for name, (ms, quality) in sorted(points.items(), key=lambda item: -item[1][0]):
        figures = [f"{100 * quality[key]:.1f}" if quality else "" for key in _QUALITY]
        rows.append((name, f"{ms:.1f}", f"{fastest / ms:.2f}x", *figures))
    head = ("network", ">ms", ">over the fastest dense", ">cosine", ">recall@1", ">recall@10")
    return Table("Accuracy against measured latency, pruned at once by ADMM", head, rows)


def plot_pareto(results: Results, path: Path) -> None:
    """Fidelity against time: uniform patterns as points, the plans as a line."""
    from matplotlib.figure import Figure

    points = pareto_points(results)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    plans = [(ms, 100 * q["cosine"]) for name, (ms, q) in points.items() if "layers" in q]
    axes.plot(*zip(*sorted(plans), strict=True), "o-", label="plan_latency", color="#2a9d5c")
    for name, (ms, quality) in points.items():
        if not quality:
            axes.axvline(ms, color="#b4b9c0", linestyle="--", linewidth=1)
            axes.annotate(name, (ms, 0.02), xycoords=("data", "axes fraction"), rotation=90)
        elif "layers" not in quality:
            axes.plot(ms, 100 * quality["cosine"], "s", color="#c8433a")
            axes.annotate(f" {name}", (ms, 100 * quality["cosine"]))
    axes.set_xlabel("median time of 16 texts of 128 tokens [ms]")
    axes.set_ylabel("mean cosine to the dense embeddings [%]")
    axes.set_title("all-MiniLM-L6-v2, pruned at once: red squares have one pattern everywhere")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


_QUALITY = ("cosine", "recall_at_1", "recall_at_10")
_STAGES = (
    ("after", "statistics", "after training, at once"),
    ("after", "recovered", "after training, trained on"),
    ("before", "recovered", "before training"),
    ("during", "recovered", "during training"),
)


def plot_sparsity(results: Results, path: Path) -> None:
    """Accuracy against sparsity, unstructured, one line for each method, by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.5), layout="constrained")
    for axes, (when, stage, title) in zip(figure.subplots(1, len(_STAGES)), _STAGES, strict=True):
        lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for asked, found in results:
            if asked["study"] != "digits" or asked["when"] != when:
                continue
            if asked["pattern"].startswith("bsr1x1") and asked["allocation"] == "uniform":
                zeros = 100 * parse_pattern(asked["pattern"]).sparsity
                lines[method_name(asked)][zeros].append(100 * found[stage])
        for number, (method, points) in enumerate(lines.items()):
            x = sorted(points)
            error = [stdev(points[each]) if len(points[each]) > 1 else 0.0 for each in x]
            axes.errorbar(
                x,
                [mean(points[each]) for each in x],
                error,
                fmt="o-" if number < 10 else "s--",
                capsize=2,
                label=method,
            )
        axes.set_title(title)
        axes.set_xlabel("zeros in the blocks' convolutions [%]")
        if lines:
            axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("accuracy on unseen digits [%]")
    figure.savefig(path, dpi=110)
