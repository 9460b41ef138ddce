import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"

# Stands in for Python, nvcc and compute-sanitizer: notes how it was called and does what FAIL says.
_STUB = """#!/bin/sh
printf "%s %s\\n" "$(basename "$0")" "$(printf "%s" "$*" | tr "\\n" " ")" >>"$CALLS"
case "$*" in *"-m bench.gpu "*) echo report >"$OUT_DIR/2026-05-04-some-gpu-sm90-gpu.md";; esac
case "$*" in *"${FAIL:-no such words}"*) echo "it broke"; exit 7;; esac
"""


class Sandbox:
    """A folder with stubs for every program that the script starts."""

    def __init__(self, folder: Path) -> None:
        self.out, self.site, self._bin = folder / "out", folder / "site", folder / "bin"
        self._calls = folder / "calls"
        self._bin.mkdir()
        self.site.mkdir()
        for program in (
            *(self._bin / name for name in ("python3", "nvcc", "compute-sanitizer")),
            self.site / "mma_rate",
        ):
            program.write_text(_STUB)
            program.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "SITE": str(self.site),
            "CALLS": str(self._calls),
            "OUT_DIR": str(self.out),
            **variables,
        }
        command = ["bash", str(SCRIPT), *(arguments or [str(self.out)])]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    @property
    def summary(self) -> str:
        return (self.out / "summary.md").read_text()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_the_syntax_is_right() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_step_runs_and_leaves_few_files(sandbox: Sandbox) -> None:
    done = sandbox.run()
    assert done.returncode == 0, done.stderr
    words = ["pip", "sk.__file__", "nvcc", "pytest -m gpu"]
    words += ["--tool memcheck", "--tool racecheck", "mma_rate"]
    words += ["-m bench.gpu --out", "-m bench.gpu_conv --out"]
    assert len(sandbox.calls) == len(words)
    for call, word in zip(sandbox.calls, words, strict=True):
        assert word in call
    assert "SPARSEKIT_CUDA_ARCHITECTURES=90" in sandbox.calls[0]
    assert f"--target {sandbox.site}" in sandbox.calls[0]
    assert "--quick" not in sandbox.calls[-2]
    assert done.stdout.endswith(sandbox.summary)
    assert "report" in sandbox.summary
    assert len(list(sandbox.out.iterdir())) == 7  # and three more from the benchmarks


def test_a_failure_is_told_and_the_next_step_runs(sandbox: Sandbox) -> None:
    done = sandbox.run(FAIL="pytest -m gpu")
    assert done.returncode == 1
    assert "| pytest -m gpu | **failed**, status 7 |" in sandbox.summary
    assert "it broke" in done.stdout
    assert "-m bench.gpu_conv" in sandbox.calls[-1]
    assert "| bench | ok |" in sandbox.summary
    assert "| bench: convolutions | ok |" in sandbox.summary


def test_steps_are_chosen_and_arguments_passed_on(sandbox: Sandbox) -> None:
    done = sandbox.run(
        str(sandbox.out), "quick", STEPS="bench", BENCH_ARGS="--rows 1 16", ARCH="80"
    )
    assert done.returncode == 0
    assert [call.split()[0] for call in sandbox.calls] == ["mma_rate", "python3", "python3"]
    assert sandbox.calls[-2].endswith("--quick --rows 1 16")


def test_an_old_report_is_not_shown_as_new(sandbox: Sandbox) -> None:
    sandbox.out.mkdir()
    old = sandbox.out / "2025-01-01-some-gpu-sm90-gpu.md"
    old.write_text("old figures")
    os.utime(old, (0, 0))
    sandbox.run(STEPS="test")
    assert "old figures" not in sandbox.summary
    assert old.exists()


def test_no_step_starts_when_time_is_up(sandbox: Sandbox) -> None:
    done = sandbox.run(TIME_LIMIT="5")
    assert done.returncode == 1
    assert sandbox.calls == []
    assert sandbox.summary.count("| no time left |") == 9


@pytest.mark.parametrize(
    ("arguments", "steps", "message"),
    [
        ((), "build fly", "STEPS has 'fly'; expected some of: build test sanitize bench"),
        (("out", "slow"), "", "usage: bench/gpu.sh OUT [quick]"),
        (("out", "quick", "more"), "", "usage"),
    ],
)
def test_a_wrong_call_is_told(
    sandbox: Sandbox, arguments: tuple[str, ...], steps: str, message: str
) -> None:
    done = sandbox.run(*arguments, STEPS=steps)
    assert done.returncode == 2
    assert message in done.stderr
    assert sandbox.calls == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [80, 90])
def test_mma_rate_compiles(arch: int, tmp_path: Path) -> None:
    source = ROOT / "bench" / "micro" / "mma_rate.cu"
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "--cubin", "-Werror", "all-warnings"]
    command += ["-I", str(ROOT / "csrc"), "-o", str(tmp_path / "cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
