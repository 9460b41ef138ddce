"""What can run, why, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparsekit as sk
from sparsekit import _native
from sparsekit.dispatch import doctor, table


def test_kernels_lists_the_registry_with_reasons() -> None:
    kernels = sk.kernels()
    assert [kernel.name for kernel in kernels] == [info.name for info in _native.kernels()]
    text = str(kernels)
    for kernel in kernels:
        assert kernel.reason
        line = next(line for line in text.splitlines() if line.split()[0] == kernel.name)
        assert kernel.reason in line
        assert line.split()[1] == ("yes" if kernel.available else "no")


def test_names_are_made_of_op_format_dtype_arch() -> None:
    for kernel in sk.kernels():
        parts = [kernel.op, kernel.format, kernel.dtype, kernel.arch, kernel.variant]
        assert kernel.name == "_".join(part for part in parts if part)


@pytest.mark.parametrize("pattern", ["2:4", "4:8v4", "bsr16x16@0.75", "bsr3x5@0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 1, 256])
def test_explain_chooses_one_kernel_and_answers_for_all(
    pattern: str, dtype: torch.dtype, m: int
) -> None:
    answer = sk.explain(pattern, m=m, n=64, k=128, dtype=dtype)
    assert len(answer.candidates) == len(sk.kernels())
    assert sum(candidate.chosen for candidate in answer.candidates) == 1
    assert answer.chosen is not None
    assert answer.chosen.ok
    assert answer.chosen.cost_us is not None
    for candidate in answer.candidates:
        assert candidate.reason
        listed = any(line.split()[0] == candidate.kernel for line in str(answer).splitlines())
        assert listed == (candidate.device == "cpu")
        assert candidate.ok == (candidate.cost_us is not None)
    first = str(answer).splitlines()[3]
    assert first.split()[:2] == [answer.chosen.kernel, "chosen"]


def test_explain_of_a_packed_weight_uses_its_own_format() -> None:
    packed = sk.pack(torch.eye(64), "2:4", target="reference")
    answer = sk.explain(packed, m=4)
    assert (answer.n, answer.k, answer.format) == (64, 64, "nm")
    assert answer.chosen is not None
    assert answer.chosen.kernel == "matmul_nm_f32_scalar"
    reasons = {candidate.kernel: candidate.reason for candidate in answer.candidates}
    assert "reads format bsr, the weight is packed as nm" in reasons["matmul_bsr_f32_scalar"]
    assert "computes bf16, the problem is f32" in reasons["matmul_nm_bf16_scalar"]


def test_explain_refuses_what_does_not_fit() -> None:
    packed = sk.pack(torch.eye(64), "2:4")
    with pytest.raises(ValueError, match="n=32, the packed weight has n=64"):
        sk.explain(packed, m=1, n=32)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16, the packed weight"):
        sk.explain(packed, m=1, dtype=torch.float16)
    with pytest.raises(ValueError, match="a pattern alone has no size; pass n= and k="):
        sk.explain("2:4", m=1, n=4)
    with pytest.raises(ValueError, match="expected m >= 0, n >= 1 and k >= 1, got m=-1"):
        sk.explain("2:4", m=-1, n=4, k=4)


@pytest.mark.parametrize("pattern", ["2:4", "bsr16x16@0.75"])
def test_explain_of_convolutions(pattern: str) -> None:
    packed = sk.pack(torch.ones(64, 16, 3, 3), pattern, groups=2)
    answer = sk.explain(packed, m=50)
    assert (answer.op, answer.n, answer.k) == ("conv2d", 32, 144)
    assert answer.chosen is not None
    assert answer.chosen.kernel.startswith("conv2d_")
    assert str(answer).startswith(f"conv2d m=50 n=32 k=144, {packed.pattern} in format")
    reasons = {candidate.kernel: candidate.reason for candidate in answer.candidates}
    assert "does matmul, not conv2d" in reasons["matmul_nm_f32_scalar"]
    alone = sk.explain(pattern, m=50, n=32, k=144, op="conv2d")
    assert alone.candidates == answer.candidates
    # Filters of 1x1 are a matrix unless they are strided.
    small = sk.pack(torch.ones(64, 16, 1, 1), pattern)
    assert sk.explain(small, m=50).op == "matmul"
    strided = sk.explain(small, m=50, op="conv2d").chosen
    assert strided is not None
    assert strided.kernel.startswith("conv2d_")


def test_explain_refuses_operations_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected op to be 'matmul' or 'conv2d', got 'conv3d'"):
        sk.explain("2:4", m=1, n=4, k=4, op="conv3d")
    with pytest.raises(ValueError, match="op='conv2d', the packed weight is a matrix"):
        sk.explain(sk.pack(torch.eye(8), "2:4"), m=1, op="conv2d")
    with pytest.raises(ValueError, match="n=64, the packed weight has n=32"):
        sk.explain(sk.pack(torch.ones(64, 16, 3, 3), "2:4", groups=2), m=1, n=64)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What a test sets here for the native library does not outlive the test."""
    with monkeypatch.context() as patch:
        yield patch
    _native.reload_environment()


def test_the_kernel_forced_by_the_environment_runs(environment: pytest.MonkeyPatch) -> None:
    packed = sk.pack(torch.eye(64), "2:4", target="reference")
    assert torch.equal(sk.linear(torch.ones(1, 64), packed), torch.ones(1, 64))
    environment.setenv("SPARSEKIT_KERNEL", "matmul_bsr_f32_scalar")
    _native.reload_environment()
    with pytest.raises((ValueError, NotImplementedError), match="matmul_bsr_f32_scalar"):
        sk.linear(torch.ones(1, 64), packed)
    assert "SPARSEKIT_KERNEL is set" in doctor()


def test_a_lower_instruction_set_can_be_forced(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SPARSEKIT_ISA", "scalar")
    _native.reload_environment()
    on_cpu = [k for k in sk.kernels() if k.device == "cpu"]
    assert {k.arch for k in on_cpu if k.available} == {"scalar"}
    packed = sk.pack(torch.eye(64), "2:4")
    answer = sk.explain(packed, m=1)
    assert answer.chosen is not None
    assert answer.chosen.kernel == "matmul_nm_f32_scalar"
    assert "SPARSEKIT_ISA is set" in doctor()
    assert torch.equal(sk.linear(torch.ones(1, 64), packed), torch.ones(1, 64))


def test_doctor_reports_the_machine() -> None:
    text = doctor()
    cpu = _native.cpu_info()
    for expected in (
        str(cpu["isa"]),
        torch.__version__,
        _native.build_info()["compiler"],
        "GPU",
        "what will run",
    ):
        assert expected in text


def test_table_aligns_columns() -> None:
    assert table(("a", "bb"), [("ccc", "d")]).splitlines() == ["a    bb", "---  --", "ccc  d"]


def test_doctor_names_the_tensorrt_plugin_or_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An empty build folder, then one with the library.
    monkeypatch.setattr(_native._C, "__file__", str(tmp_path / "_C.so"))
    assert "TensorRT plugin" in doctor()
    assert "none: built without TensorRT" in doctor()
    plugin = tmp_path / "libsparsekit_tensorrt.so"
    plugin.touch()
    assert str(plugin) in doctor()
