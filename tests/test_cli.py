"""The command line: each command prints what the library says; errors are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit import gate
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
