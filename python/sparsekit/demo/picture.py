"""The report as one PNG: latency, layers, quality and size, losses in red beside wins in green."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekit.demo.encoder import require

_WIN, _LOSS, _DENSE, _BEST_DENSE = "#2a9d5c", "#c8433a", "#b4b9c0", "#5b6675"
# Labels may cross the reference line.
_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the report.

    Args:
        report: As in `report.json`.
        path: The PNG to write; replaced if it exists.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib")
    # The object interface with Agg: no global state, no display, whatever backend the caller uses.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(report), fontsize=14)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1))[0]
    latencies = list(report["latency"].values())
    axes = left.subplots(len(latencies) + 1, 1, height_ratios=[1.0] * len(latencies) + [0.6])
    for row, latency in zip(axes, latencies, strict=False):
        _latency(row, latency)
    _size(axes[-1], report["files"])
    axes = right.subplots(2, 1)
    _layers(axes[0], report["layers"])
    _quality(axes[1], report["quality"])
    figure.savefig(path, format="png")


def _title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    text = (
        f"all-MiniLM-L6-v2, {settings['pattern']} by {settings['method']}, {settings['dtype']}, "
        f"{report['machine']['threads']} threads of {report['machine']['cpu']}"
    )
    return f"QUICK RUN: {text}" if report["quick"] else text


def _latency(axes: Any, latency: dict[str, Any]) -> None:
    rows = [row for row in latency["engines"] if "ms" in row]
    fastest = latency["fastest_dense"]
    limit = next(row["ms"] for row in rows if row["name"] == fastest)

    def colour(row: dict[str, Any]) -> str:
        if not row["sparse"]:
            return _BEST_DENSE if row["name"] == fastest else _DENSE
        return _WIN if row["ms"] < limit else _LOSS

    names = [row["name"] + ("\n(fastest dense)" if row["name"] == fastest else "") for row in rows]
    bars = axes.barh(names, [row["ms"] for row in rows], color=[colour(row) for row in rows])
    axes.bar_label(
        bars,
        [f"{row['ms']:.1f} ms ({row['speedup']:.2f}x)" for row in rows],
        padding=3,
        fontsize=9,
        bbox=_BOX,
    )
    axes.axvline(limit, color=_BEST_DENSE, linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlabel("median latency [ms]; in brackets: speed over torch eager float32")
    axes.set_title(
        f"End to end, batch {latency['batch']} of {latency['tokens']} tokens "
        "(green beats the fastest dense, red does not)",
        fontsize=11,
    )


def _quality(axes: Any, quality: dict[str, dict[str, float]]) -> None:
    stages = list(quality)
    measures = {
        "recall_at_1": "recall@1",
        "recall_at_10": "recall@10",
        "cosine": "cosine to dense × 100",
    }
    width = 0.8 / len(stages)
    shades = ("#5b6675", "#e0a458", "#7fb98f", "#2a9d5c")
    for number, stage in enumerate(stages):
        positions = [index + (number - (len(stages) - 1) / 2) * width for index in range(3)]
        values = [quality[stage][measure] * 100 for measure in measures]
        bars = axes.bar(positions, values, width, label=stage, color=shades[number % len(shades)])
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=7.5, padding=1)
    axes.set_xticks(range(3), list(measures.values()))
    axes.set_ylim(0, 118)
    axes.set_ylabel("on the test half [%]")
    axes.set_title("Quality: a docstring's first paragraph finds the rest", fontsize=11)
    axes.legend(ncols=len(stages), loc="upper left", fontsize=8, frameon=False)


def _size(axes: Any, files: dict[str, Any]) -> None:
    names = ["dense file", "sparse file", "dense Linears", "sparse Linears"]
    keys = ["dense_bytes", "sparse_bytes", "dense_linear_bytes", "sparse_linear_bytes"]
    values = [files[key] / 1e6 for key in keys]
    bars = axes.barh(names, values, color=[_DENSE, _WIN, _DENSE, _WIN])
    axes.bar_label(bars, [f"{value:.1f} MB" for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("size [MB = 10⁶ bytes]")
    axes.set_title("On disk (the vocabulary's embeddings stay dense)", fontsize=11)


def _layers(axes: Any, layers: list[dict[str, Any]]) -> None:
    # Layers of one shape share one measurement: one bar for each of these.
    groups: dict[tuple[Any, ...], int] = {}
    for layer in layers:
        activation = f" + {layer['activation']}" if layer["activation"] else ""
        label = "×".join(str(size) for size in layer["shape"]) + activation
        key = (label, layer["verdict"], layer["dense_ms"], layer["sparse_ms"], layer["speedup"])
        groups[key] = groups.get(key, 0) + 1
    timed = [(*key, count) for key, count in groups.items() if key[-1] is not None]
    names = [f"{label}\n×{count}, runs {verdict}" for label, verdict, *_, count in timed]
    colours = [_WIN if verdict == "sparse" else _LOSS for _, verdict, *_ in timed]
    bars = axes.barh(names, [speed for *_, speed, _ in timed], color=colours, height=0.6)
    labels = [f"{speed:.2f}x\n{dense:.2f} → {ours:.2f} ms" for _, _, dense, ours, speed, _ in timed]
    axes.bar_label(bars, labels, padding=4, fontsize=9, bbox=_BOX)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("fastest dense time / sparse time [ratio]; right of the line sparse is faster")
    untimed = sum(layer["speedup"] is None for layer in layers)
    note = f"; {untimed} not timed" if untimed else ""
    axes.set_title(f"Linear layers (n×k), green where sparse was kept{note}", fontsize=11)
