import json
from pathlib import Path
from typing import Any

import pytest

from bench import report


def case(shape: str, speedup: float, forced: bool = False) -> dict[str, Any]:
    return {
        "extra_info": {
            "shape": shape,
            "m": 256,
            "n": 1000,
            "k": 500,
            "pattern": "2:4",
            "dtype": "float32",
            "kernel": "matmul_nm_f32_scalar",
            "forced": forced,
            "threads": 2,
            "ms": 2.0,
            "gflops": 125.0,
            "speedup": speedup,
            "fastest_dense": "onednn",
            "rivals_ms": {"torch": 8.0, "onednn": 2.0 * speedup},
            "machine": {"cpu": "Some CPU (R) 3000", "isa": "avx2", "torch": "2.13.0"},
        },
    }


def write(path: Path, *cases: dict[str, Any]) -> Path:
    content = {"datetime": "2026-05-04T10:11:12+00:00", "benchmarks": list(cases)}
    path.write_text(json.dumps(content))
    return path


def test_losses_stand_beside_wins(tmp_path: Path) -> None:
    file = write(tmp_path / "b.json", case("a.win", 1.5), case("a.loss", 0.8))
    text = report.markdown(report.read(file))
    assert "2 cases: 1 faster than the fastest dense path, 1 slower." in text
    loss, win = (line for line in text.splitlines() if line.startswith("| a."))
    assert loss.startswith("| a.loss |")
    assert loss.endswith("| 1.600 | 8.000 | 0.80x (loss) |")
    assert win.endswith("| 3.000 | 8.000 | **1.50x** |")


def test_a_baseline_that_could_not_run_is_a_dash(tmp_path: Path) -> None:
    without = case("b", 2.0)
    del without["extra_info"]["rivals_ms"]["torch"]
    text = report.markdown(report.read(write(tmp_path / "b.json", case("a", 1.0), without)))
    assert "| 4.000 | – | **2.00x** |" in text


def test_forced_kernels_are_not_counted_as_cases(tmp_path: Path) -> None:
    run = report.read(write(tmp_path / "b.json", case("a", 2.0), case("a", 0.1, forced=True)))
    text = report.markdown(run)
    assert "1 cases: 1 faster than the fastest dense path, 0 slower." in text
    assert text.index("The kernel the package chooses") < text.index("Every kernel")


def test_files_are_named_by_date_and_cpu(tmp_path: Path) -> None:
    file = write(tmp_path / "b.json", case("a", 1.5), case("b", 0.5))
    report.main([str(file), "--out", str(tmp_path / "out")])
    stem = "2026-05-04-some-cpu-r-3000-avx2"
    picture = tmp_path / "out" / f"{stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"({stem}.png)" in (tmp_path / "out" / f"{stem}.md").read_text()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "other.json", {"extra_info": {}})
    with pytest.raises(ValueError, match=r"expected cases of bench/test_matmul\.py, found none"):
        report.read(file)
