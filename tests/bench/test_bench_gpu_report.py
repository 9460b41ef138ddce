from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu_cases import BANDWIDTH, FASTEST_DENSE, GOALS, INSTRUCTION_RATE, Goal
from bench.gpu_report import (
    Result,
    Run,
    Timed,
    cases,
    goals,
    kernels,
    main,
    markdown,
    percentile,
    read,
    regimes,
    save,
    tables,
)
from sparsekit.demo.report import Table

SMALL, LARGE = "matmul_nm_mma_sp_f16_sm80_64x8", "matmul_nm_mma_sp_f16_sm80_64x16"


def timed(us: float) -> Timed:
    return Timed(us, us * 0.9, us * 1.1, 21, True)


RESULT = Result(
    regime="decode-2:4-f16",
    pattern="2:4",
    dtype="f16",
    m=1,
    n=8192,
    k=8192,
    kernel=SMALL,
    paths={
        "sparsekit": timed(20),
        SMALL: timed(20),
        LARGE: timed(25),
        "cuBLAS": timed(40),
        "cuBLASLt": timed(36),
        "cuSPARSELt": replace(timed(30), captured=False),
    },
    speedup={"cuBLAS": 2.0, "cuBLASLt": 1.8, "cuSPARSELt": 1.5},
    unavailable={"torch CUTLASS": "RuntimeError: needs 8.x"},
    bytes_moved=80_000_000,
    copy_gbytes_per_s=5000.0,
    instruction="mma.sp.m16n8k32",
    instruction_operations=2 * 8192 * 8192,
)
LOST = replace(
    RESULT,
    m=16,
    kernel=LARGE,
    paths={**RESULT.paths, "sparsekit": timed(40), LARGE: timed(40)},
    speedup={"cuBLAS": 1.0, "cuBLASLt": 0.9, "cuSPARSELt": 0.75},
)
RATES = [
    {
        "instruction": instruction,
        "dtype": "f16",
        "shared_loads": loads,
        "warps_per_sm": warps,
        "tflops": tflops,
        "flops_per_clock_per_sm": 4096.0,
    }
    for instruction, loads, warps, tflops in (
        ("mma.sp.m16n8k32", False, 4, 900.0),
        ("mma.sp.m16n8k32", False, 8, 1000.0),
        ("mma.sp.m16n8k32", True, 8, 2000.0),
        ("mma.m16n8k16", False, 8, 600.0),
    )
]


def run(*results: Result) -> Run:
    return Run(
        date="2026-05-04",
        gpu="Some GPU",
        arch="sm90",
        sm_count=132,
        l2_bytes=60 << 20,
        software={"torch": "2.11"},
        before={"SM clock": "345 MHz"},
        after={"SM clock": "1980 MHz"},
        rates=RATES,
        results=list(results),
    )


def row(table: Table, number: int = 0) -> dict[str, str]:
    heads = (column.lstrip(">") for column in table.columns)
    return dict(zip(heads, table.rows[number], strict=True))


def test_a_result_knows_its_rates() -> None:
    assert RESULT.fastest_dense == "cuBLASLt"
    assert RESULT.tflops == pytest.approx(2 * 8192 * 8192 / 20e-6 / 1e12)
    assert RESULT.gbytes_per_s == pytest.approx(4000)
    assert RESULT.bandwidth_share == pytest.approx(0.8)
    assert replace(RESULT, copy_gbytes_per_s=None).bandwidth_share is None


def test_the_choice_is_judged_by_the_fastest_kernel() -> None:
    assert RESULT.choice == 1
    assert LOST.choice == 2
    assert replace(RESULT, kernel="matmul_another").choice is None


def test_what_is_done_around_a_kernel_shows() -> None:
    slow = replace(RESULT, paths={**RESULT.paths, "sparsekit": timed(30)})
    assert row(regimes(run(slow)))["call / its kernel"] == "1.50"
    assert replace(RESULT, kernel="matmul_another").around is None


def test_shares_are_of_the_rate_on_registers() -> None:
    dense_equivalent = replace(RESULT, instruction_operations=10**10)  # in 20 µs: 500 TFLOP/s
    assert run().rate_share(dense_equivalent) == pytest.approx(0.5)
    blocks = replace(dense_equivalent, instruction="mma.m16n8k16")
    assert run().rate_share(blocks) == pytest.approx(500 / 600)
    assert run().rate_share(replace(blocks, dtype="bf16")) is None


@pytest.mark.parametrize(
    ("goal", "mean", "verdict", "lowest"),
    [
        (Goal("decode-2:4-f16", FASTEST_DENSE, 1.2), "1.27x", "reached", "0.90x (m=16 8192x8192)"),
        (Goal("decode-2:4-f16", FASTEST_DENSE, 1.3), "1.27x", "missed", "0.90x (m=16 8192x8192)"),
        (Goal("decode-2:4-f16", "cuSPARSELt", 1.0), "1.06x", "reached", "0.75x (m=16 8192x8192)"),
        (Goal("decode-2:4-f16", BANDWIDTH, 0.8), "57%", "missed", "40% (m=16 8192x8192)"),
        (Goal("decode-2:4-f16", BANDWIDTH, 0.8, least_rows=17), "", "", ""),
        (Goal("decode-2:4-f16", "torch BSR", 1.0), "", "", ""),
    ],
)
def test_goals_stand_beside_results(goal: Goal, mean: str, verdict: str, lowest: str) -> None:
    table = goals(run(RESULT, LOST), [goal])
    if not mean:
        assert not table.rows
        return
    found = row(table)
    assert (found["mean"], found[""], found["lowest"]) == (mean, verdict, lowest)
    assert found["number"] == "2"
    assert table.marks == ["win" if verdict == "reached" else "loss"]


def test_the_instruction_rate_is_a_goal_too() -> None:
    half = replace(RESULT, instruction_operations=10**10)
    table = goals(run(half), [Goal("decode-2:4-f16", INSTRUCTION_RATE, 0.8)])
    assert row(table)["mean"] == "50%"


def test_small_layers_do_not_count_for_goals_on_large_ones() -> None:
    small = replace(RESULT, n=4096, k=4096, speedup={"cuBLAS": 0.1})
    for found in goals(run(RESULT, small)).rows:
        assert found[3] == "1"


def test_a_regime_has_means_its_lowest_case_and_its_losses() -> None:
    found = row(regimes(run(RESULT, LOST)))
    assert found["cases"] == "2"
    assert found["over fastest dense"] == "1.27"
    assert found["lowest"] == "0.90 (m=16 8192x8192)"
    assert found["losses"] == "1"
    assert (found["over cuSPARSELt"], found["over torch BSR"]) == ("1.06", "–")
    assert (found["of copy bandwidth"], found["of the instruction's rate"]) == ("57%", "–")
    assert (found["chosen / fastest kernel"], found["most"]) == ("1.41", "2.00")


def test_a_regime_without_dense_times_has_a_row() -> None:
    alone = replace(RESULT, speedup={}, paths={"sparsekit": timed(20)}, copy_gbytes_per_s=None)
    found = row(regimes(run(alone)))
    assert (found["over fastest dense"], found["lowest"], found["losses"]) == ("–", "–", "0")
    assert found["most"] == "–"
    assert row(cases(run(alone)))["over fastest dense"] == "–"


def test_cases_show_spread_losses_and_who_failed() -> None:
    failing = replace(RESULT, paths={**RESULT.paths, "torch CUTLASS": timed(50)}, m=4)
    table = cases(run(RESULT, LOST, failing))
    won, lost = row(table), row(table, 1)
    assert won["µs (p10 to p90, rounds)"] == "20.0 (18.0 to 22.0, 21)"
    assert won["over fastest dense"] == "**1.80x**"
    assert won["cuSPARSELt"] == "30.0 (no graph)"
    assert won["torch CUTLASS"] == "failed"
    assert lost["over fastest dense"] == "0.90x (loss)"
    assert "torch BSR" not in won


def test_every_kernel_stands_beside_the_chosen_one() -> None:
    table = kernels(run(RESULT, LOST))
    assert table.rows[0][-1] == "**64x8 20.0**, 64x16 25.0"
    assert table.rows[1][-1] == "64x8 20.0, **64x16 40.0**"


def test_the_report_tells_what_is_missing() -> None:
    measured = run(RESULT, LOST)
    measured.failures.append("a case: wrong")
    measured.left_out.append("another case")
    text = markdown(measured)
    assert "- torch CUTLASS: RuntimeError: needs 8.x (2 cases)" in text
    assert "- a case: wrong" in text
    assert "- another case" in text
    assert "SM clock 1980 MHz" in text
    assert text.index("## Goals") < text.index("## Cases")


def test_an_empty_run_has_a_report() -> None:
    assert "Some GPU" in markdown(run())


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    measured = run(RESULT, LOST)
    text, figures = save(measured, tmp_path)
    assert text.name == "2026-05-04-some-gpu-sm90-gpu.md"
    assert read(figures) == measured
    text.unlink()
    main([str(figures)])
    assert text.read_text() == markdown(measured)


@pytest.mark.parametrize("content", ['{"results": []}', '{"results": [{}]}', "{}"])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json: expected what bench\.gpu writes"):
        read(path)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.1, 1.3), (0.9, 3.7)]
)
def test_percentiles(share: float, expected: float) -> None:
    assert percentile([4.0, 2.0, 1.0, 3.0], share) == pytest.approx(expected)
    assert percentile([7.0], share) == 7


@pytest.mark.parametrize("table", [*tables(run(RESULT, LOST)), cases(run(RESULT, LOST))])
def test_tables_are_as_wide_as_their_heads(table: Table) -> None:
    for cells in table.rows:
        assert len(cells) == len(table.columns)


def test_goals_over_peers_name_peers() -> None:
    known = {FASTEST_DENSE, BANDWIDTH, INSTRUCTION_RATE, "cuSPARSELt", "torch BSR"}
    assert {goal.over for goal in GOALS} <= known
