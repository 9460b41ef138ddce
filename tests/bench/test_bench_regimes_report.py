from dataclasses import replace
from pathlib import Path

import pytest

from bench.regimes_report import Result, Run, markdown, peers, save, summary
from sparsekit.demo.report import Table

RESULT = Result(
    regime="r",
    pattern="2:4",
    dtype="f32",
    m=64,
    n=128,
    k=256,
    threads=1,
    counts=True,
    kernel="matmul_nm_f32_scalar",
    ms=2.0,
    speedup=2.0,
    fastest_dense="oneDNN",
    dense_ms={"torch": 8.0, "oneDNN": 4.0},
    peers_ms={"deepsparse": 3.0},
    unavailable={},
    gate_speedup=None,
    gate_keeps_dense=None,
    gbytes_per_s=None,
    bandwidth_share=None,
)
LOST = replace(RESULT, m=256, speedup=0.5, gate_speedup=0.6, gate_keeps_dense=True)


def run(*results: Result) -> Run:
    goals = {"r": (1.5, 2.0)}
    return Run("2026-05-04", "Some CPU", "avx2", "2.13", goals, "read bandwidth is", list(results))


def cells(of: Run) -> dict[str, str]:
    table = summary(of)
    return dict(zip((c.lstrip(">") for c in table.columns), table.rows[0], strict=True))


def test_the_mean_is_geometric_and_leaves_out_what_does_not_count() -> None:
    row = cells(run(RESULT, LOST, replace(RESULT, m=16, counts=False, speedup=4.0)))
    assert (row["mean"], row["m=16"], row["of the limit"]) == ("1.00x", "4.00x", "50%")
    assert (row["worst case"], row["worst"]) == ("2:4 m=256 128x256", "0.50x")
    assert (row["cases"], row["below 0.95x"], row["of these kept dense"]) == ("3", "1", "1")


def test_thread_counts_have_rows_of_their_own() -> None:
    rows = summary(run(RESULT, replace(LOST, threads=2))).rows
    assert [(row[1], row[4]) for row in rows] == [("1", "2.00x"), ("2", "0.50x")]


def test_goals_met_and_missed_look_different() -> None:
    assert summary(run(RESULT)).marks == ["win"]
    assert summary(run(LOST)).marks == ["loss"]


def test_without_a_goal_nothing_is_won_or_lost() -> None:
    free = run(RESULT)
    free.goals["r"] = (None, 2.0)
    assert summary(free).marks == [""]
    assert "goal" not in cells(free)
    assert cells(free)["of the limit"] == "100%"


def test_convolutions_are_told_by_their_layer() -> None:
    layer = "3x3-64-64-at-56, batch 1"
    measured = replace(run(replace(RESULT, layer=layer)), title="Convolutions")
    assert cells(measured)["worst case"] == "2:4 3x3-64-64-at-56, batch 1"
    text = markdown(measured)
    assert text.startswith("# Convolutions: Some CPU")
    assert "| r | 2:4 | 3x3-64-64-at-56, batch 1 | 64 | 128 | 256 |" in text
    assert "m=16" not in text
    assert "| layer |" not in markdown(run(RESULT))


def test_streaming_reports_the_share_of_bandwidth() -> None:
    row = cells(run(replace(RESULT, gbytes_per_s=20.0, bandwidth_share=0.8)))
    assert (row["GB/s"], row["of read bandwidth"]) == ("20.0", "80%")
    assert "GB/s" not in cells(run(RESULT))


def test_peers_stand_beside_dense_and_ours() -> None:
    assert peers(run(RESULT)).rows == [("r", "1", "deepsparse", "1", "1.33x", "1.50x")]


def test_the_report_tells_losses_and_what_failed() -> None:
    measured = run(RESULT, LOST, replace(LOST, m=1024, gate_keeps_dense=False))
    measured.failures.append("a case: wrong")
    text = markdown(measured)
    assert "**2.00x**" in text
    assert "0.50x (loss) | gate keeps dense (0.60x) |" in text
    assert "gate keeps SPARSE (0.60x)" in text
    assert "- a case: wrong" in text


def test_files_are_named_by_date_and_cpu(tmp_path: Path) -> None:
    text, figures = save(run(RESULT), tmp_path / "out")
    assert text.name == "2026-05-04-some-cpu-avx2-regimes.md"
    assert figures.with_suffix(".md") == text


@pytest.mark.parametrize("table", [summary(run(RESULT, LOST)), peers(run(RESULT))])
def test_tables_are_as_wide_as_their_heads(table: Table) -> None:
    for row in table.rows:
        assert len(row) == len(table.columns)
