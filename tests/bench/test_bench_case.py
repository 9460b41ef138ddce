import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsekit as sk
from bench import case as module
from bench import report
from bench.case import Case, chosen_cases, kernel_cases, prepare, streamed_bytes
from bench.shapes import Shape

SMALL = Shape("test", "small", 64, 96, (3,))


def test_names_are_unique() -> None:
    names = [case.name for case in (*chosen_cases(), *kernel_cases())]
    assert len(names) == len(set(names))


def test_every_kernel_that_can_run_is_measured() -> None:
    measured = {case.kernel.name for case in kernel_cases() if case.kernel}
    cpu = [k for k in sk.kernels() if k.available and k.device == "cpu" and k.op == "matmul"]
    expected = {k.name for k in cpu if k.dtype in ("f32", "bf16")}
    assert measured == expected


@pytest.mark.parametrize("dtype", module.DTYPES)
@pytest.mark.parametrize("pattern", module.PATTERNS)
def test_prepare_names_the_kernel_that_runs(pattern: str, dtype: torch.dtype) -> None:
    prepared = prepare(Case(SMALL, 3, pattern, dtype))
    weight = sk.pack(torch.randn(64, 96).to(dtype), pattern)
    chosen = sk.explain(weight, m=3).chosen
    assert chosen is not None
    assert prepared.kernel == chosen.kernel
    assert prepared.ours().shape == (3, 64)
    assert {"torch", "oneDNN"} <= prepared.dense.keys()


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, packed: sk.PackedWeight, bias: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], packed.shape[0])

    monkeypatch.setattr(sk, "linear", wrong)
    with pytest.raises(AssertionError, match="error against float64"):
        prepare(Case(SMALL, 3, "2:4", torch.float32))


@pytest.mark.parametrize("size", [(77, 130), (64, 96)])
@pytest.mark.parametrize("pattern", ["2:4v4", "bsr1x1@0.9", "bsr16x16@0.75", "bsr8x8@0.0"])
def test_random_masks_keep_what_the_pattern_keeps(pattern: str, size: tuple[int, int]) -> None:
    parsed = sk.parse_pattern(pattern)
    mask = module.random_mask(parsed, *size, torch.Generator().manual_seed(0))
    assert mask.shape == size
    assert parsed.fits(mask)
    if isinstance(parsed, sk.BlockSparse):
        kept = int(parsed.occupancy(mask).sum())
        # Equal scores at the border may cost a block or two.
        assert parsed.blocks_kept(*size) - 2 <= kept


@pytest.mark.parametrize("row", [0, -1])
def test_a_large_result_is_checked_by_some_rows(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECKED", 64 * 96 * 4)
    x, weight, bias = torch.randn(50, 96), torch.randn(64, 96), torch.randn(64)
    y = torch.nn.functional.linear(x, weight, bias)
    module.check(y, x, weight, bias)
    y[row] += 1
    with pytest.raises(AssertionError, match="error against float64"):
        module.check(y, x, weight, bias)
    y[row] = torch.nan
    with pytest.raises(AssertionError, match="NaN"):
        module.check(y, x, weight, bias)


def test_one_case_from_the_command_to_the_report(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only"]
    command += [f"--benchmark-json={file}", "--seconds=0", "--threads=1"]
    command += ["-k", "resnet-50.layer4.conv3-m49-2:4v4-f32"]
    root = Path(__file__).parents[2]
    # A worker of pytest-xdist must not make the benchmark another: those do not measure.
    alone = {name: os.environ[name] for name in os.environ if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = report.read(file)
    (row,) = run.rows
    assert (row.shape, row.m, row.n, row.k) == ("resnet-50.layer4.conv3", 49, 2048, 512)
    assert (row.pattern, row.dtype, row.threads) == ("2:4v4", "float32", 1)
    assert row.rivals_ms.keys() == {"torch", "oneDNN", "onnxruntime", "torch-csr", "torch-bsr16x16"}
    assert row.gflops == pytest.approx(2e-6 * 49 * 2048 * 512 / row.ms)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "bsr16x16@0.75", "bsr1x1@0.5"])
def test_streamed_bytes_are_those_of_the_canonical_form(pattern: str) -> None:
    packed = sk.pack(torch.randn(64, 96), pattern)
    canonical = packed.canonical()
    pointers = canonical.crow_indices
    expected = canonical.nbytes - (0 if pointers is None else pointers.nbytes)
    assert streamed_bytes(packed.pattern, *packed.shape, packed.dtype) == expected
