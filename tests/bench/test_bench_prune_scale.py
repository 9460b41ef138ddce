"""The benchmark of pruning at scale, at a small one."""

import json

import pytest

from bench import prune_scale


def test_a_small_stack_is_pruned_killed_and_resumed(tmp_path, capsys):
    options = ["--layers", "6", "--size", "32", "--tokens", "64", "--kill", "--out", str(tmp_path)]
    prune_scale.main(options)
    (path,) = tmp_path.glob("*-prune-scale.json")
    result = json.loads(path.read_text())["result"]
    assert result["high_water_mib"] > result["anonymous_peak_mib"] > 0
    assert result["anonymous_peak_mib"] >= 0.9 * result["anonymous_before_mib"]
    text = path.with_suffix(".md").read_text()
    assert "| layers | 6 of 32x32, bfloat16 |" in text
    assert "equal bits" in text
    assert "wrote" in capsys.readouterr().out


def test_the_solve_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(prune_scale, "_REPEATED_S", 0)
    prune_scale.main(["--solve", "--sizes", "64", "16", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-prune-solve.json")
    solved = json.loads(path.read_text())["solve"]
    assert list(solved) == ["16", "64"]
    for parts in solved.values():
        assert list(parts) == ["moment", "factorisation", "sweep", "least_squares"]
        assert all(seconds > 0 for seconds in parts.values())


def test_what_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(prune_scale, "_LIMIT_S", 100)
    found = prune_scale.measure_solve(16, {"sweep": (8, 13.0), "least_squares": (8, 6.0)})
    assert found["sweep"] is None
    assert found["least_squares"] is not None


def test_wrong_arguments_are_refused():
    with pytest.raises(SystemExit):
        prune_scale.arguments(["--layers", "0"])
