"""The command line: each command prints what the library says; errors are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit import dispatch, gate
from sparsekit.cli import app
from sparsekit.dispatch import doctor
from sparsekit.gate import Verdict


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_doctor() -> None:
    assert invoke("doctor") == (0, doctor() + "\n", "")


def test_kernels() -> None:
    assert invoke("kernels") == (0, f"{sk.kernels()}\n", "")


def test_explain() -> None:
    expected = sk.explain("2:4v4", m=3, n=64, k=128, dtype=torch.bfloat16)
    code, out, _ = invoke(
        "explain", "2:4v4", "-m", "3", "-n", "64", "-k", "128", "--dtype", "bfloat16"
    )
    assert (code, out) == (0, f"{expected}\n")


def test_inspect(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    sk.save({"fc": sk.pack(torch.eye(16), "2:4")}, path)
    assert invoke("inspect", str(path)) == (0, f"{sk.inspect(path)}\n", "")


def test_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(3.0, 1.0, 3.0, "oneDNN", "some_kernel")
    monkeypatch.setattr(gate, "measure", lambda *_: verdict)
    code, out, _ = invoke("bench", "1:4", "-m", "2", "-m", "5", "-n", "16", "-k", "32")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["2", "5"]
    assert "3.00x" in out


def test_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dispatch, "tune", lambda pattern, **options: given.update(options) or "T")
    code, out, _ = invoke(
        "tune", "1:4", "--m", "2,5", "--n", "16", "--k", "32", "--dtype", "bfloat16",
        "--threads", "3",
    )  # fmt: skip
    assert (code, out) == (0, "T\n")
    expected = {"m": [2, 5], "n": 16, "k": 32, "dtype": torch.bfloat16}
    assert given == {**expected, "device": "cpu", "threads": 3}


def test_what_is_tuned_is_listed_and_cleared() -> None:
    nothing = "nothing is tuned; sparsekit tune measures\n"
    assert invoke("tune", "--list") == (0, nothing, "")
    code, out, _ = invoke("tune", "2:4", "-m", "4", "-n", "16", "-k", "32", "--threads", "1")
    assert code == 0
    assert "2:4 f32 n=16 k=32" in out
    assert invoke("tune", "--list") == (0, f"{dispatch.tuned()}\n", "")
    assert "2:4 f32 n=16 k=32" in dispatch.tuned()
    assert invoke("tune", "--clear") == (0, "", "")
    assert invoke("tune", "--list") == (0, nothing, "")


def test_tune_wants_numbers() -> None:
    code, _, err = invoke("tune", "--m", "1,many")
    assert code == 2
    assert "expected numbers such as 1,8,64, got '1,many'" in " ".join(err.split())


def test_demo_passes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("sparsekit.demo.run", lambda **options: given.update(options))
    code, _, err = invoke(
        "demo", "--pattern", "2:4v4", "--method", "wanda", "--dtype", "bfloat16", "--quick",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert given == {
        "pattern": "2:4v4",
        "method": "wanda",
        "dtype": "bfloat16",
        "out": tmp_path,
        "quick": True,
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("explain", "2;4"), "error: pattern: expected a Pattern or a spelling"),
        (("explain", "2:4", "-m", "-1"), "error: explain: expected m >= 0"),
        (("tune", "2:4", "--m", "0"), "error: tune: expected one m or several"),
        (("bench", "bsr0x0"), "error: BlockSparse: block_shape must be"),
        (("inspect", "no/such/file"), "error: "),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], says: str) -> None:
    code, out, err = invoke(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith(says)
    assert err.count("\n") == 1
