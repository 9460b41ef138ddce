"""Arguments of `sparsekit.export.onnx`, and what happens to files when something fails."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_cases import assert_same_bits, evaluate, linear, randn, results, write
from torch import nn

import sparsekit as sk
from sparsekit.export import api, packages


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def model() -> nn.Module:
    return nn.Sequential(linear(64, 32), nn.ReLU(), linear(16, 64, "bsr16x16@0.5"))


WRONG = [
    ({"weights": "gpu"}, "expected weights to be one of ('canonical', 'cuda'), got 'gpu'"),
    ({"weights": "cuda", "dense": True}, "weights='cuda' is a format of sparse nodes"),
    ({"quantize": "int4", "dense": True}, "expected quantize to be None or 'int8', got 'int4'"),
    ({"quantize": "int8"}, "quantize='int8' is for plain ONNX; pass dense=True"),
    ({"calibration": []}, "calibration is for quantize='int8'"),
    ({"opset_version": 17}, "expected opset_version as a number from 18 to "),
    ({"opset_version": "20"}, "the last that this ONNX knows, got '20'"),
    ({"opset_version": 99}, "the last that this ONNX knows, got 99"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments(options: dict[str, Any], message: str, path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        write(model(), randn(2, 32), path, **options)
    assert message in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_is_missing_or_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing; make it first"):
        write(model(), randn(2, 32), tmp_path / "missing" / "model.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        write(model(), randn(2, 32), tmp_path)


def test_a_failed_export_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(model(), randn(2, 32), path)
    old = path.read_bytes()

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such luck")

    with pytest.raises(Exception, match="no such luck"):
        write(Broken(), randn(2, 32), path)

    def fail(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("not this time")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(onnx.checker.ValidationError, match="not this time"):
        write(model(), randn(2, 32, seed=3), path)
    assert path.read_bytes() == old
    assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]


def test_modes_are_restored_when_an_export_fails(path: Path) -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    broken = nn.Sequential(linear(8, 8), Picky()).train()
    with pytest.raises(Exception, match="no"):
        write(broken, randn(2, 8), path)
    assert all(module.training for module in broken.modules())


def test_a_new_file_is_like_any_other(path: Path) -> None:
    write(model(), randn(2, 32), path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o600)
    write(model(), randn(2, 32), str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("dense", [False, True])
def test_large_models_keep_their_constants_beside_the_file(
    dense: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_LARGEST_FILE", 1000)
    net, x = model().eval(), randn(3, 32)
    report = write(net, x, path, dense=dense)
    data = path.with_name("model.onnx.data")
    assert report.external_data == data
    assert report.nbytes == path.stat().st_size + data.stat().st_size
    assert "model.onnx with model.onnx.data: 2 sparse layers" in str(report)
    assert path.stat().st_size < data.stat().st_size
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, data.name]
    onnx.checker.check_model(str(path), full_check=True)
    if not dense:
        assert_same_bits(evaluate(path, x), results(net, x))
    monkeypatch.undo()
    assert write(net, x, path).external_data is None


def test_what_fails_when_a_large_model_is_renamed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_LARGEST_FILE", 1000)
    renamed: list[str] = []
    real = os.replace

    def note(source: Any, target: Any) -> None:
        if Path(target).parent == path.parent:
            renamed.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", note)
    write(model(), randn(2, 32), path)
    # The file that names the other one comes last.
    assert renamed == ["model.onnx.data", "model.onnx"]


def test_a_progress_bar(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sk.export.onnx(model(), randn(2, 32), path)
    assert "export: 100%" in capsys.readouterr().err
    write(model(), randn(2, 32), path)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_a_tuple_a_tensor_and_keywords_are_one_example(path: Path) -> None:
    net, x = model().eval(), randn(2, 32)
    for args, kwargs in ((x, None), ((x,), None), ((), {"input": x})):
        write(net, args, path, kwargs=kwargs)
        assert_same_bits(evaluate(path, x), results(net, x))


def test_without_the_packages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def found(name: str, *args: Any) -> Any:
        return None if name in ("onnx", "onnxscript") else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    expected = (
        r"needs onnx, onnxscript, which this Python does not have; "
        r'run pip install "sparsekit-kernels\[onnx\]"'
    )
    with pytest.raises(ImportError, match="export: " + expected):
        write(model(), randn(2, 32), path)
    with pytest.raises(ImportError, match="reference_ops: " + expected):
        sk.export.reference_ops()
    with pytest.raises(ImportError, match="register_schemas: " + expected):
        sk.export.register_schemas()


def test_an_old_torch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.torch, "__version__", "2.8.1+cpu")
    with pytest.raises(ImportError, match=r"export: needs torch 2\.9 or later, this is 2\.8"):
        write(model(), randn(2, 32), path)


def test_importing_does_not_import_onnx() -> None:
    code = (
        "import sys, sparsekit as sk; sk.export.onnx, sk.export.reference_ops;"
        "print(sorted({'onnx', 'onnxscript', 'onnx_ir', 'ml_dtypes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "bsr16x16@0.5"])
def test_a_model_on_a_gpu(pattern: str, path: Path) -> None:
    net = nn.Sequential(linear(64, 64, pattern, torch.float16), nn.ReLU()).cuda().eval()
    x = randn(4, 64, dtype=torch.float16)
    write(net, x.cuda(), path)
    assert net[0].packed_data.is_cuda
    (y,) = evaluate(path, x)
    torch.testing.assert_close(y, results(net, x.cuda())[0].cpu(), rtol=1e-2, atol=1e-2)
    assert_same_bits([y], results(net.cpu(), x))
