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
