import json
from pathlib import Path
from typing import Any

import pytest

from bench import tensorrt_report


def case(model: str, ours: float, **rivals: float) -> dict[str, Any]:
    return {
        "extra_info": {
            "device": "Orin",
            "tensorrt": "10.3.0",
            "model": model,
            "pattern": "2:4",
            "batch": 1,
            "ms": {"ours": ours, **rivals},
            "over": {name: ms / ours for name, ms in rivals.items()},
            "failed": {},
        }
    }


def write(path: Path, *cases: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"datetime": "2026-05-04T10:11:12", "benchmarks": list(cases)}))
    return path


def test_losses_are_named_and_what_failed_is_told(tmp_path: Path) -> None:
    lost = case("b", 2.0, dense=1.0)
    lost["extra_info"]["failed"] = {"int8": "no tactic"}
    file = write(tmp_path / "a.json", case("a", 1.0, dense=1.5, int8=0.75), lost)
    date, cases = tensorrt_report.read(file)
    text = tensorrt_report.markdown(date, cases)
    assert text.startswith("# Orin, TensorRT 10.3.0, 2026-05-04")
    assert "| a | 2:4 | 1 | 1.000 | 1.500, 1.50x | 0.750, 0.75x (loss) |" in text
    assert "| b | 2:4 | 1 | 2.000 | 1.000, 0.50x (loss) | failed |" in text
    assert "- b 2:4 batch 1, int8: no tactic" in text


def test_a_rival_that_was_not_asked_is_a_dash(tmp_path: Path) -> None:
    cases = [case("a", 1.0, dense=1.5, sparse=2.0), case("b", 1.0, dense=1.5)]
    _, read = tensorrt_report.read(write(tmp_path / "a.json", *cases))
    assert "| b | 2:4 | 1 | 1.000 | 1.500, 1.50x | – |" in tensorrt_report.markdown("", read)


def test_the_file_is_named_after_device_and_version(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", case("a", 1.0, dense=1.5))
    tensorrt_report.main([str(file), "--out", str(tmp_path / "results")])
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "2026-05-04-orin-tensorrt-10-3-0.md"


def test_a_file_of_another_suite_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"extra_info": {"speedup": 1.0}})
    with pytest.raises(ValueError, match=r"expected cases of bench/test_tensorrt\.py, found none"):
        tensorrt_report.read(file)
